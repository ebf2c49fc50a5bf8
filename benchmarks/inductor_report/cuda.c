// The driver's library to go with cudart.c, as libcuda.so.1.
typedef int Error;
Error cuInit(unsigned flags) { return 0; }
Error cuDriverGetVersion(int *version) { *version = 13000; return 0; }
Error cuDeviceGetCount(int *count) { *count = 1; return 0; }
Error cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
Error cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
Error cuGetErrorString(int error, const char **text) { *text = "on paper"; return 0; }
Error cuStreamGetCaptureInfo_v2(void *s, int *status, void *a, void *b, void *c, void *d) { *status = 0; return 0; }
