// Kernels without a fault: the checks must find nothing in any of them.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdio.h>

#define KERNEL extern "C" __global__ void

__device__ int acquire(const int *p) {
  int v;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ void release(int *p, int v) {
  asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

KERNEL saxpy(float *y, const float *x, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = 2.0f * x[i] + y[i];
}

KERNEL block_sum(float *out, const float *x, int n) {
  extern __shared__ float s[];
  float v = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) v += x[i];
  s[threadIdx.x] = v;
  __syncthreads();
  for (int d = blockDim.x / 2; d > 0; d /= 2) {
    if (threadIdx.x < d) s[threadIdx.x] += s[threadIdx.x + d];
    __syncthreads();
  }
  if (threadIdx.x == 0) *out = s[0];
}

KERNEL warp_sum(float *out, const float *x, int n) {
  __shared__ float s[32];
  float v = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) v += x[i];
  for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(~0u, v, d);
  if (threadIdx.x % 32 == 0) s[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x < 32) {
    v = threadIdx.x < blockDim.x / 32 ? s[threadIdx.x] : 0.0f;
    for (int d = 16; d; d >>= 1) v += __shfl_down_sync(~0u, v, d);
    if (threadIdx.x == 0) *out = v;
  }
}

KERNEL scan(int *out, const int *in, int n) {
  __shared__ int s[2][256];
  int t = threadIdx.x, from = 0;
  s[0][t] = t < n ? in[t] : 0;
  __syncthreads();
  for (int d = 1; d < blockDim.x; d *= 2) {
    s[1 - from][t] = s[from][t] + (t >= d ? s[from][t - d] : 0);
    from = 1 - from;
    __syncthreads();
  }
  if (t < n) out[t] = s[from][t];
}

KERNEL warp_scan(int *out, const int *in) {
  int lane = threadIdx.x % 32, v = in[threadIdx.x];
  for (int d = 1; d < 32; d *= 2) {
    int u = __shfl_up_sync(~0u, v, d);
    if (lane >= d) v += u;
  }
  out[threadIdx.x] = v;
}

KERNEL histogram(int *bins, const int *x, int n) {
  __shared__ int s[16];
  if (threadIdx.x < 16) s[threadIdx.x] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    atomicAdd(&s[x[i] & 15], 1);
  __syncthreads();
  if (threadIdx.x < 16) atomicAdd(&bins[threadIdx.x], s[threadIdx.x]);
}

KERNEL transpose(float *out, const float *in, int n) {
  __shared__ float tile[32][33];
  int x = blockIdx.x * 32 + threadIdx.x, y = blockIdx.y * 32 + threadIdx.y;
  for (int j = 0; j < 32; j += 8)
    if (x < n && y + j < n) tile[threadIdx.y + j][threadIdx.x] = in[(y + j) * n + x];
  __syncthreads();
  x = blockIdx.y * 32 + threadIdx.x;
  y = blockIdx.x * 32 + threadIdx.y;
  for (int j = 0; j < 32; j += 8)
    if (x < n && y + j < n) out[(y + j) * n + x] = tile[threadIdx.x][threadIdx.y + j];
}

KERNEL matmul(float *c, const float *a, const float *b, int n) {
  __shared__ float sa[16][16], sb[16][16];
  int row = blockIdx.y * 16 + threadIdx.y, col = blockIdx.x * 16 + threadIdx.x;
  float sum = 0;
  for (int k = 0; k < n; k += 16) {
    sa[threadIdx.y][threadIdx.x] = a[row * n + k + threadIdx.x];
    sb[threadIdx.y][threadIdx.x] = b[(k + threadIdx.y) * n + col];
    __syncthreads();
    for (int i = 0; i < 16; i++) sum += sa[threadIdx.y][i] * sb[i][threadIdx.x];
    __syncthreads();
  }
  c[row * n + col] = sum;
}

// The last block to finish adds up what the others left: a fence, then a counter.
KERNEL last_block(float *out, float *partial, int *count, const float *x, int n) {
  __shared__ bool last;
  float v = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) v += x[i];
  for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(~0u, v, d);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = v;
    __threadfence();
    last = atomicAdd(count, 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    float sum = 0;
    for (int b = 0; b < gridDim.x; b++) sum += partial[b];
    *out = sum;
  }
}

KERNEL spin_lock(int *lock, int *value) {
  if (threadIdx.x % 32 == 0) {
    while (atomicCAS(lock, 0, 1) != 0) {
    }
    __threadfence();
    *value = *value + 1;
    __threadfence();
    atomicExch(lock, 0);
  }
}

// All lanes of a warp fight for one lock: it ends only if the scheduler is fair inside a warp.
KERNEL lane_lock(int *lock, int *value) {
  bool done = false;
  while (!done) {
    if (atomicCAS(lock, 0, 1) == 0) {
      __threadfence();
      *value = *value + 1;
      __threadfence();
      atomicExch(lock, 0);
      done = true;
    }
  }
}

KERNEL message(int *data, int *flag, int *out) {
  if (blockIdx.x == 0) {
    data[threadIdx.x] = 100 + threadIdx.x;
    __syncthreads();
    if (threadIdx.x == 0) release(flag, 1);
  } else {
    if (threadIdx.x == 0)
      while (acquire(flag) == 0) {
      }
    __syncthreads();
    out[threadIdx.x] = data[threadIdx.x];
  }
}

KERNEL grid_barrier(int *count, int *data, int *out) {
  data[blockIdx.x * blockDim.x + threadIdx.x] = blockIdx.x + 1;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(count, 1);
    while (*(volatile int *)count < gridDim.x) {
    }
    __threadfence();
  }
  __syncthreads();
  int next = (blockIdx.x + 1) % gridDim.x;
  out[blockIdx.x * blockDim.x + threadIdx.x] = data[next * blockDim.x + threadIdx.x];
}

KERNEL named_barriers(int *out, int rounds) {
  __shared__ int slot[32];
  int lane = threadIdx.x % 32;
  for (int r = 0; r < rounds; r++) {
    if (threadIdx.x < 32) {
      slot[lane] = 10 * r + lane;
      asm volatile("bar.arrive 1, 64;" ::: "memory");
      asm volatile("bar.sync 2, 64;" ::: "memory");
    } else {
      asm volatile("bar.sync 1, 64;" ::: "memory");
      out[32 * r + lane] = slot[31 - lane];
      asm volatile("bar.arrive 2, 64;" ::: "memory");
    }
  }
}

KERNEL warp_synchronous(int *out) {
  __shared__ int s[32];
  int lane = threadIdx.x;
  s[lane] = lane * lane;
  __syncwarp();
  int v = s[31 - lane];
  __syncwarp();
  s[lane] = v + 1;
  __syncwarp();
  out[lane] = s[(lane + 1) % 32];
}

KERNEL half_warps(int *out) {
  __shared__ int s[32];
  int lane = threadIdx.x;
  s[lane] = lane;
  if (lane < 16) {
    __syncwarp(0xffffu);
    out[lane] = s[15 - lane];
  } else {
    __syncwarp(0xffff0000u);
    out[lane] = s[47 - lane];
  }
}

KERNEL compact(int *out, int *count, const int *in, int n) {
  int i = threadIdx.x, v = i < n ? in[i] : 0;
  bool keep = i < n && v % 3 == 0;
  unsigned mask = __ballot_sync(~0u, keep);
  int base = 0;
  if (i % 32 == 0) base = atomicAdd(count, __popc(mask));
  base = __shfl_sync(~0u, base, 0);
  if (keep) out[base + __popc(mask & ((1u << (i % 32)) - 1))] = v;
}

KERNEL aggregated(int *bins, const int *keys) {
  int key = keys[threadIdx.x];
  unsigned same = __match_any_sync(~0u, key);
  if ((threadIdx.x & 31) == __ffs(same) - 1) atomicAdd(&bins[key], __popc(same));
}

KERNEL bitonic(int *data) {
  __shared__ int s[128];
  int t = threadIdx.x;
  s[t] = data[t];
  __syncthreads();
  for (int k = 2; k <= 128; k *= 2)
    for (int j = k / 2; j > 0; j /= 2) {
      int other = t ^ j;
      if (other > t) {
        int a = s[t], b = s[other];
        if ((a > b) == ((t & k) == 0)) {
          s[t] = b;
          s[other] = a;
        }
      }
      __syncthreads();
    }
  data[t] = s[t];
}

KERNEL bytes(unsigned char *out) { out[threadIdx.x] = (unsigned char)(3 * threadIdx.x); }

KERNEL vectors(float4 *out, const float4 *__restrict__ in, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {
    float4 v = __ldg(&in[i]);
    out[i] = make_float4(v.w, v.z, v.y, v.x);
  }
}

KERNEL softmax(float *out, const float *in, int n) {
  const float *row = in + blockIdx.x * n;
  float m = -INFINITY, sum = 0;
  for (int i = threadIdx.x; i < n; i += 32) m = fmaxf(m, row[i]);
  for (int d = 16; d; d >>= 1) m = fmaxf(m, __shfl_xor_sync(~0u, m, d));
  for (int i = threadIdx.x; i < n; i += 32) sum += __expf(row[i] - m);
  for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
  for (int i = threadIdx.x; i < n; i += 32) out[blockIdx.x * n + i] = __expf(row[i] - m) / sum;
}

__device__ __noinline__ int fibonacci(int n) { return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2); }
KERNEL recursion(int *out) { out[threadIdx.x] = fibonacci(threadIdx.x % 10); }

__device__ __noinline__ int twice(int x) { return 2 * x; }
__device__ __noinline__ int square(int x) { return x * x; }
__device__ int (*const table[2])(int) = {twice, square};
KERNEL pointers(int *out) { out[threadIdx.x] = table[threadIdx.x & 1](threadIdx.x); }

KERNEL local_array(int *out, const int *order) {
  int a[16];
  for (int i = 0; i < 16; i++) a[order[i]] = i * threadIdx.x;
  int sum = 0;
  for (int i = 0; i < 16; i++) sum = 31 * sum + a[order[15 - i]];
  out[threadIdx.x] = sum;
}

KERNEL halves(__half2 *out, const __half2 *a, const __nv_bfloat162 *b) {
  __half2 x = a[threadIdx.x];
  float2 y = __bfloat1622float2(b[threadIdx.x]);
  out[threadIdx.x] = __hfma2(x, x, __floats2half2_rn(y.x, y.y));
}

KERNEL stencil(float *a, float *b, int n, int steps) {
  for (int s = 0; s < steps; s++) {
    float *from = s % 2 ? b : a, *to = s % 2 ? a : b;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      float left = i ? from[i - 1] : 0.0f, right = i + 1 < n ? from[i + 1] : 0.0f;
      to[i] = 0.25f * left + 0.5f * from[i] + 0.25f * right;
    }
    __syncthreads();
  }
}

KERNEL printing(int n) {
  if (threadIdx.x < n) printf("thread %d of %s: %5.2f %c%%\n", threadIdx.x, "block", 0.5 * threadIdx.x, 'x');
}

// Waits for the host to write the flag.
KERNEL spinner(volatile int *flag, int *out) {
  while (*flag == 0) __nanosleep(100);
  *out = *flag;
}

// One lane waits for a flag that nobody writes, until its time is over; its warp, and the block,
// wait for it at the barrier.
KERNEL deadline(volatile int *flag, int *out, unsigned long long nanoseconds) {
  bool late = false;
  if (threadIdx.x == 0) {
    unsigned long long start, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start)::"memory");
    while (*flag == 0 && !late) {
      asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
      late = now - start > nanoseconds;
      __nanosleep(1000);
    }
  }
  out[threadIdx.x] = __syncthreads_or(late) != 0;
}

KERNEL early_exit(int *out, int n) {
  if (threadIdx.x >= n) return;
  out[threadIdx.x] = 1;
  __syncthreads();
  int v = out[n - 1 - threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = v + 1;
}

// For the measurement of speed: arithmetic, shared and global memory in the proportions of a
// tiled product.
KERNEL speed(float *out, const float *in, int rounds) {
  __shared__ float s[256];
  int t = threadIdx.x;
  float a = in[blockIdx.x * 256 + t], sum = 0;
  for (int r = 0; r < rounds; r++) {
    s[t] = a;
    __syncthreads();
#pragma unroll 8
    for (int i = 0; i < 32; i++) sum = fmaf(s[(t + i) & 255], a, sum);
    __syncthreads();
    a = 0.5f * a + 0.25f;
  }
  out[blockIdx.x * 256 + t] = sum;
}
