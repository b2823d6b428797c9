// Kernels with one fault each. The line with the fault says so: `fault: <kernel>`.
#include <assert.h>

#define KERNEL extern "C" __global__ void

__constant__ int constant[4] = {1, 2, 3, 4};

KERNEL read_beyond(int *out, const int *in, int n) {
  out[threadIdx.x] = in[threadIdx.x + 1];  // fault: read_beyond
}
KERNEL write_beyond(char *out, int n) {
  if (threadIdx.x <= n) out[threadIdx.x] = 1;  // fault: write_beyond
}
KERNEL shared_beyond(int *out) {
  extern __shared__ int s[];
  s[threadIdx.x + 1] = threadIdx.x;  // fault: shared_beyond
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];
}
KERNEL local_beyond(int *out, int i) {
  int a[4] = {1, 2, 3, 4};
  a[i] = 5;
  out[threadIdx.x] = a[i + 400000];  // fault: local_beyond
}
KERNEL null_pointer(int *out, const int *in) {
  out[threadIdx.x] = in[threadIdx.x];  // fault: null_pointer
}
KERNEL misaligned(float4 *out, const char *in) {
  *out = *(const float4 *)(in + 4);  // fault: misaligned
}
KERNEL after_free(int *out, const int *in) {
  out[threadIdx.x] = in[threadIdx.x];  // fault: after_free
}
KERNEL unwritten_branch(int *out, const int *in) {
  if (in[threadIdx.x] > 3)  // fault: unwritten_branch
    out[threadIdx.x] = 1;
  else
    atomicAdd(out, 7);
}
KERNEL unwritten_result(int *out, const int *in) {
  out[threadIdx.x] = in[threadIdx.x] * 2;  // fault: unwritten_result
}
KERNEL unwritten_shared(int *out) {
  __shared__ int s[64];
  if (threadIdx.x < 63) s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = s[63 - threadIdx.x];  // fault: unwritten_shared
}
KERNEL unwritten_index(int *out, const int *in, const int *table) {
  out[threadIdx.x] = table[in[threadIdx.x] & 3];  // fault: unwritten_index
}
KERNEL unwritten_counter(int *count) {
  atomicAdd(count, 1);  // fault: unwritten_counter
}
KERNEL unwritten_local(int *out, int i) {
  int a[8];
  for (int k = 0; k < 7; k++) a[(k + i) & 7] = k;
  out[threadIdx.x] = a[(i + 7) & 7];  // fault: unwritten_local
}
KERNEL missing_barrier(int *out) {
  __shared__ int s[64];
  s[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = s[63 - threadIdx.x];  // fault: missing_barrier
}
KERNEL missing_second_barrier(int *out) {
  __shared__ int s[64];
  int sum = 0;
  for (int r = 0; r < 4; r++) {
    s[threadIdx.x] = threadIdx.x + r;  // fault: missing_second_barrier
    __syncthreads();
    sum += s[63 - threadIdx.x];
  }
  out[threadIdx.x] = sum;
}
KERNEL missing_syncwarp(int *out) {
  __shared__ volatile int s[32];
  ((int *)s)[threadIdx.x] = threadIdx.x;
  asm volatile("" ::: "memory");
  out[threadIdx.x] = ((int *)s)[31 - threadIdx.x];  // fault: missing_syncwarp
}
KERNEL same_word(int *out) {
  if (threadIdx.x == 0) *out = blockIdx.x;  // fault: same_word
}
KERNEL plain_histogram(int *bins, const int *keys) {
  int k = keys[threadIdx.x];
  bins[k] = bins[k] + 1;  // fault: plain_histogram
}
KERNEL counter_read_plainly(int *out, int *count) {
  for (int i = 0; i < 8; i++) atomicAdd(count, 1);
  if (threadIdx.x == 40) *out = *count;  // fault: counter_read_plainly
}
KERNEL counter_reset_plainly(int *count) {
  for (int i = 0; i < 8; i++) atomicAdd(count, 1);
  if (threadIdx.x == 40) *count = 0;  // fault: counter_reset_plainly
}
KERNEL byte_overwritten(unsigned char *out, unsigned char *data) {
  out[threadIdx.x] = data[threadIdx.x % 32];  // fault: byte_overwritten
  if (threadIdx.x == 40) data[5] = 7;  // fault: byte_overwritten
}
KERNEL missing_fence(int *data, int *flag, int *out) {
  if (blockIdx.x == 0) {
    *data = 42;
    *(volatile int *)flag = 1;
  } else {
    while (*(volatile int *)flag == 0) {
    }
    __threadfence();
    *out = *data;  // fault: missing_fence
  }
}
KERNEL narrow_scope(int *data, int *flag, int *out) {
  if (blockIdx.x == 0) {
    *data = 42;
    asm volatile("st.release.cta.global.b32 [%0], 1;" ::"l"(flag) : "memory");
  } else {
    int v;
    do asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(v) : "l"(flag) : "memory");  // fault: narrow_scope
    while (v == 0);
    *out = *data;  // fault: narrow_scope
  }
}
KERNEL last_block_without_fence(float *out, float *partial, int *count) {
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = 1.0f;
    if (atomicAdd(count, 1) == gridDim.x - 1) {
      __threadfence();
      float sum = 0;
      for (int b = 0; b < gridDim.x; b++) sum += partial[b];  // fault: last_block_without_fence
      *out = sum;
    }
  }
}
KERNEL non_coherent(int *out, int *data) {
  data[threadIdx.x] = threadIdx.x;  // fault: non_coherent
  __syncthreads();
  int v;
  asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(v) : "l"(data + 31 - threadIdx.x) : "memory");  // fault: non_coherent
  out[threadIdx.x] = v;
}
KERNEL mask_without_self(int *out) {
  out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, (int)threadIdx.x, 1);  // fault: mask_without_self
}
KERNEL mask_of_others(int *out) {
  if (threadIdx.x < 16)
    out[threadIdx.x] = __shfl_xor_sync(~0u, (int)threadIdx.x, 1);  // fault: mask_of_others
  else
    asm volatile("barrier.sync 1;");
}
KERNEL diverged_barrier(int *out) {
  if (threadIdx.x % 32 < 16) {
    out[threadIdx.x] = 1;
    asm volatile("bar.sync 1;" ::: "memory");  // fault: diverged_barrier
  } else {
    out[threadIdx.x] = 2;
    asm volatile("bar.sync 2;" ::: "memory");  // fault: diverged_barrier
  }
}
KERNEL barrier_of_too_many(int *out) {
  if (threadIdx.x < 32)
    asm volatile("bar.sync 1, 64;" ::: "memory");  // fault: barrier_of_too_many
  out[threadIdx.x] = 1;
}
KERNEL barrier_that_disagrees(int *out) {
  if (threadIdx.x < 32)
    asm volatile("bar.sync 1, 64;" ::: "memory");  // fault: barrier_that_disagrees
  else
    asm volatile("bar.sync 1, 96;" ::: "memory");  // fault: barrier_that_disagrees
  out[threadIdx.x] = 1;
}
KERNEL waits_for_ever(volatile int *flag) {
  while (*flag == 0) {  // fault: waits_for_ever
  }
}
KERNEL too_many_blocks(int *count) {
  extern __shared__ int s[];
  if (threadIdx.x == 0) {
    atomicAdd(count, 1);
    while (*(volatile int *)count < gridDim.x) {  // fault: too_many_blocks
    }
  }
}
KERNEL writes_constant(int *out) {
  int *p = (int *)constant;
  asm volatile("" : "+l"(p));
  p[1] = 5;  // fault: writes_constant
  *out = constant[1];
}
KERNEL failed_assertion(int n) {
  assert(threadIdx.x < n);  // fault: failed_assertion
}
KERNEL trapped(int n) {
  if (threadIdx.x == n) __trap();  // fault: trapped
}
