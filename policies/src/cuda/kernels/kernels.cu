// All kernels as one module.
#include "attention.cu"
#include "decode.cu"
#include "head.cu"
#include "layer.cu"
#include "optimise.cu"
#include "sample.cu"
