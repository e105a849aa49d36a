"""Cold routes: management, lists, health, documentation."""
