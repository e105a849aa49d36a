"""llama.cpp in a child process per loaded model, from its wheel or as a llama-server binary."""
