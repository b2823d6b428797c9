// What the gates must catch: an array that the compiler cannot keep in registers, and narrow loads.
extern "C" __global__ void has_a_stack(const float *in, float *out, int n) {
    float values[64];
    for (int i = 0; i < n; i++) values[i & 63] = in[i];
    for (int i = 0; i < n; i++) out[i] = values[(i * 7) & 63];
}
