#include "score/kernels.cuh"

template specprefill::ScoreKernel specprefill::score_kernel_for<specprefill::KeysF8<false>>(int, int, int);
