// A CUDA runtime with one H100 that exists on paper: enough for the host code of PyTorch that asks for the device,
// its streams and its events. Nothing runs. Loaded in front of the real one by LD_PRELOAD (paper_gpu.py).
#include <stddef.h>
#include <string.h>

typedef int Error;
static long handle = 0x1000;
static Error made(void **x) { *x = (void *)(handle += 16); return 0; }

Error cudaGetDeviceCount(int *count) { *count = 1; return 0; }
Error cudaGetDevice(int *device) { *device = 0; return 0; }
Error cudaSetDevice(int device) { return 0; }
Error cudaGetLastError(void) { return 0; }
Error cudaPeekAtLastError(void) { return 0; }
Error cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
Error cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
Error cudaDeviceSynchronize(void) { return 0; }
Error cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = 0; return 0; }
Error cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return 0;
}
Error cudaDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
        case 1: *value = 1024; break;     // threads per block
        case 8: *value = 49152; break;    // shared memory per block
        case 10: *value = 32; break;      // warp size
        case 16: *value = 132; break;     // multiprocessors
        case 39: *value = 2048; break;    // threads per multiprocessor
        case 75: *value = 9; break;       // compute capability, major
        case 76: *value = 0; break;       // and minor
        case 97: *value = 232448; break;  // shared memory per block that can be asked for
        default: *value = 1;
    }
    return 0;
}
Error cudaGetDeviceProperties(char *properties, int device) {
    memset(properties, 0, 1008);
    strcpy(properties, "NVIDIA H100 on paper");
    return 0;
}
Error cudaGetDeviceProperties_v2(char *properties, int device) { return cudaGetDeviceProperties(properties, device); }
Error cudaMemGetInfo(size_t *left, size_t *total) { *left = *total = 80ul << 30; return 0; }

Error cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { return made(stream); }
Error cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
Error cudaStreamSynchronize(void *stream) { return 0; }
Error cudaStreamQuery(void *stream) { return 0; }
Error cudaStreamGetPriority(void *stream, int *priority) { *priority = 0; return 0; }
Error cudaStreamWaitEvent(void *stream, void *event, unsigned flags) { return 0; }
Error cudaEventCreateWithFlags(void **event, unsigned flags) { return made(event); }
Error cudaEventRecord(void *event, void *stream) { return 0; }
Error cudaEventQuery(void *event) { return 0; }
Error cudaEventSynchronize(void *event) { return 0; }
Error cudaEventDestroy(void *event) { return 0; }
