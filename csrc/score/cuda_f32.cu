#include "score/kernels.cuh"

template specprefill::ScoreKernel specprefill::score_kernel_for<specprefill::KeysF32>(int, int, int);
