// The mix of kernels that benches/speed.rs times: what they do is checked there too.
#define KERNEL extern "C" __global__ void

// y += 3 x: a fifth of the instructions is global memory.
KERNEL saxpy(float *y, const float *x, int n) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    y[i] = 3.0f * x[i] + y[i];
}

// c = a b, of n by n with tiles of 16 by 16 in shared memory: two shared loads a multiply-add.
KERNEL matmul(float *c, const float *a, const float *b, int n) {
  __shared__ float as[16][16], bs[16][16];
  int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  int row = blockIdx.y * 16 + ty, column = blockIdx.x * 16 + tx;
  float sum = 0;
  for (int k = 0; k < n; k += 16) {
    as[ty][tx] = a[row * n + k + tx];
    bs[ty][tx] = b[(k + ty) * n + column];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 16; i++) sum += as[ty][i] * bs[i][tx];
    __syncthreads();
  }
  c[row * n + column] = sum;
}

// The sum of each block's part: shuffles within warps, shared memory between them.
KERNEL reduce(float *out, const float *x, int n) {
  __shared__ float parts[32];
  float sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += x[i];
  for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = threadIdx.x < blockDim.x / 32 ? parts[threadIdx.x] : 0.0f;
    for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
  }
}

// A matrix by a vector, a warp to a row: everybody reads the vector.
KERNEL gemv(float *y, const float *w, const float *x, int n) {
  int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
  float sum = 0;
  for (int k = lane; k < n; k += 32) sum += w[row * n + k] * x[k];
  for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  if (lane == 0) y[row] = sum;
}

// Shared atomics for the block's counts, global ones to add them up.
KERNEL histogram(int *bins, const unsigned char *x, int n) {
  __shared__ int own[256];
  own[threadIdx.x] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    atomicAdd(&own[x[i]], 1);
  __syncthreads();
  if (own[threadIdx.x]) atomicAdd(&bins[threadIdx.x], own[threadIdx.x]);
}

// Blocks pass a row of values round by round: each waits for its neighbour's flag, as ring
// collectives do.
KERNEL ring(float *rows, unsigned *flags, int rounds) {
  int left = (blockIdx.x + gridDim.x - 1) % gridDim.x, t = threadIdx.x;
  for (int r = 0; r < rounds; r++) {
    if (t == 0 && r) {
      unsigned seen;
      do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(flags + left) : "memory");
      while (seen < r);
    }
    __syncthreads();
    const float *from = rows + (r * gridDim.x + left) * blockDim.x;
    float *to = rows + ((r + 1) * gridDim.x + blockIdx.x) * blockDim.x;
    to[t] = from[t] + 1.0f;
    __syncthreads();
    if (t == 0)
      asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flags + blockIdx.x), "r"(r + 1) : "memory");
  }
}

// Arithmetic alone: what the interpreter costs without memory.
KERNEL arithmetic(float *out, int rounds) {
  float a = threadIdx.x, b = 0.5f;
  int k = blockIdx.x;
  for (int r = 0; r < rounds; r++) {
    a = fmaf(a, b, 1.0f);
    b = b * 0.75f + 0.1f;
    k = k * 5 + (r ^ k >> 3);
    a = k & 64 ? a : b;
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = a + k;
}
