# dlkernels._build is written by setup.py: what this build is.
VERSION: str
TORCH_VERSION: str
FLAGS: str
CUDA_REASON: str  # why there are no CUDA kernels, or ""
