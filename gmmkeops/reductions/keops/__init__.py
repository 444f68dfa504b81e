"""The KeOps engine: formulas that KeOps compiles for the CPU or CUDA."""
