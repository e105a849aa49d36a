"""What this machine is (`describe`) and how busy it is (`Sampler`), containers included."""

from ollama_distributed.adapters.hardware.description import describe as describe
from ollama_distributed.adapters.hardware.sampler import Sampler as Sampler
