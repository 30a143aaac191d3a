#include "score/kernels.cuh"

template specprefill::ScoreKernel specprefill::score_kernel_for<specprefill::KeysSplitF16>(int, int, int);
