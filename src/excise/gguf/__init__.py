"""GGUF: files written, patched, run by llama.cpp and measured there."""
