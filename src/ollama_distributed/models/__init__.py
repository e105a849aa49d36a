"""What a model is: names, manifest, Modelfile, GGUF header, memory estimate. Pure."""
