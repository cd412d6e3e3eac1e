// What the body of a kernel needs to be compiled, and tested, as plain C++ too.
#pragma once

struct CUstream_st;  // cudaStream_t points to one

#ifdef __CUDACC__
#define TML_HOST_DEVICE __host__ __device__
#else
#define TML_HOST_DEVICE
#endif
