// What the CPU and a CUDA kernel share is compiled for both.
#pragma once

#if defined(__CUDACC__)
#define FASTPROTO_HD __host__ __device__
#else
#define FASTPROTO_HD
#endif
