// A GPU that computes nothing: what torch asks of CUDA, answered without one.
//
// Memory is address space that nobody touches, copies from the device bring the zeros it begins
// with, all other calls succeed and do nothing. What is asked for and not written out here,
// benchmarks/null_gpu.py adds: functions that return success. Compiled twice: as CUDA's runtime with
// cuBLAS and cuDNN, and with -DDRIVER as its driver, which Triton and the inductor ask.

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define API __attribute__((visibility("default")))
#define MEMORY (141ull << 30)  // an H200's
#define PROCESSORS 132
#define SHARED 232448
#define PINNED (1ull << 40)  // of the host, more than is ever asked for

#ifdef DRIVER

static int success(void) { return 0; }

API CUresult cuDeviceGetCount(int *count) { return *count = 1, 0; }
API CUresult cuDeviceGet(CUdevice *device, int number) { return *device = number, 0; }
API CUresult cuDriverGetVersion(int *version) { return *version = CUDA_VERSION, 0; }
API CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, 0; }
API CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, 0; }
API CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    return *context = (CUcontext)1, 0;
}
API CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    return *flags = 0, *active = 1, 0;
}
API CUresult cuGetErrorString(CUresult error, const char **text) { return *text = "", 0; }
API CUresult cuModuleLoad(CUmodule *module, const char *name) { return *module = (CUmodule)1, 0; }
API CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    return *module = (CUmodule)1, 0;
}
API CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    return *function = (CUfunction)1, 0;
}
API CUresult cuPointerGetAttribute(void *found, CUpointer_attribute what, CUdeviceptr pointer) {
    return *(CUdeviceptr *)found = pointer, 0;
}
API CUresult cuFuncGetAttribute(int *value, CUfunction_attribute what, CUfunction function) {
    *value = what == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : 0;
    return 0;
}
API CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute what, CUdevice device) {
    switch (what) {
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = PROCESSORS; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = 49152; break;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
        case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *value = 1980000; break;
        case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = 3200000; break;
        case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 6144; break;
        default: *value = 0;
    }
    return 0;
}

API CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function,
                                          const CUlaunchConfig *config) {
    return *clusters = 1, 0;
}
API CUresult cuGetProcAddress(const char *name, void **function, int version, cuuint64_t flags,
                              CUdriverProcAddressQueryResult *found) {
    return *function = (void *)success, 0;
}

#else

static int success(void) { return 0; }
static int active(int device, unsigned *flags, int *is) { return *flags = 0, *is = 1, 0; }

static void *reserved(size_t size) {
    return mmap(0, size ? size : 1, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

static char *pinned(void) {
    static char *begin;
    return begin ? begin : (begin = reserved(PINNED));
}

static cudaError_t copied(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    if (kind == cudaMemcpyDeviceToHost) memcpy(to, from, size);
    return 0;
}

API cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, 0; }
API cudaError_t cudaGetDevice(int *device) { return *device = 0, 0; }
API cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, 0; }
API const char *cudaGetErrorString(cudaError_t error) { return ""; }
API const char *cudaGetErrorName(cudaError_t error) { return ""; }
API cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
    memset(found, 0, sizeof *found);
    strcpy(found->name, "NVIDIA H200 (null)");
    found->major = 9;
    found->multiProcessorCount = PROCESSORS;
    found->totalGlobalMem = MEMORY;
    found->warpSize = 32;
    found->maxThreadsPerBlock = 1024;
    found->maxThreadsPerMultiProcessor = 2048;
    found->sharedMemPerBlock = 49152;
    found->sharedMemPerBlockOptin = SHARED;
    found->sharedMemPerMultiprocessor = SHARED + 1024;
    found->regsPerBlock = found->regsPerMultiprocessor = 65536;
    found->l2CacheSize = 50 << 20;
    for (int axis = 0; axis < 3; axis++) {
        found->maxGridSize[axis] = axis ? 65535 : 2147483647;
        found->maxThreadsDim[axis] = axis < 2 ? 1024 : 64;
    }
    return 0;
}
API cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr what, int device) {
    switch (what) {
        case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
        case cudaDevAttrMultiProcessorCount: *value = PROCESSORS; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = SHARED; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
        case cudaDevAttrWarpSize: *value = 32; break;
        case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
        case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
        case cudaDevAttrMaxGridDimY:
        case cudaDevAttrMaxGridDimZ: *value = 65535; break;
        default: *value = 0;
    }
    return 0;
}
API cudaError_t cudaMemGetInfo(size_t *left, size_t *all) { return *left = *all = MEMORY, 0; }
API cudaError_t cudaMalloc(void **pointer, size_t size) { return *pointer = reserved(size), 0; }
API cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
    static size_t taken;
    *pointer = pinned() + __atomic_fetch_add(&taken, size + 4095 & ~4095ull, __ATOMIC_RELAXED);
    return 0;
}
API cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    return copied(to, from, size, kind);
}
API cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind,
                                cudaStream_t stream) {
    return copied(to, from, size, kind);
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    return *least = 0, *greatest = -5, 0;
}
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    return *stream = malloc(1), 0;
}
API cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    return *priority = 0, 0;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    return *status = cudaStreamCaptureStatusNone, 0;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                         unsigned long long *id, cudaGraph_t *graph,
                                         const cudaGraphNode_t **nodes,
                                         const cudaGraphEdgeData **edges, size_t *count) {
    return *status = cudaStreamCaptureStatusNone, 0;
}
API cudaError_t cudaEventCreate(cudaEvent_t *event) { return *event = malloc(1), 0; }
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    return *event = malloc(1), 0;
}
API cudaError_t cudaEventElapsedTime(float *time, cudaEvent_t begin, cudaEvent_t end) {
    return *time = 1, 0;
}
API cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *function) {
    memset(found, 0, sizeof *found);
    found->ptxVersion = found->binaryVersion = 90;
    found->maxThreadsPerBlock = 1024;
    return 0;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, const void *function, int size, size_t shared, unsigned flags) {
    return *blocks = 2, 0;
}
API cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *pointer) {
    memset(found, 0, sizeof *found);
    if ((size_t)((char *)pointer - pinned()) < PINNED) found->type = cudaMemoryTypeHost;
    return 0;
}
API cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function,
                                                 unsigned version, unsigned long long flags,
                                                 enum cudaDriverEntryPointQueryResult *result) {
    *function = strstr(name, "PrimaryCtxGetState") ? (void *)active : (void *)success;
    if (result) *result = cudaDriverEntryPointSuccess;
    return 0;
}
API int __cudaLaunchKernel() { return 0; }

API int cublasCreate_v2(void **handle) { return *handle = calloc(1, 4096), 0; }
API int cublasLtMatmulAlgoGetHeuristic(void *handle, void *what, void *a, void *b, void *c, void *d,
                                       void *preference, int wanted, void *results, int *found) {
    return memset(results, 0, 64), *found = 1, 0;
}

API size_t cudnnGetVersion(void) { return CUDNN; }
API int cudnnCreate(void **handle) { return *handle = calloc(1, 4096), 0; }
API int cudnnBackendCreateDescriptor(int type, void **found) { return *found = calloc(1, 64), 0; }
API int cudnnBackendGetAttribute(void *of, int name, int type, long wanted, long *found, void *at) {
    if (found) *found = 1;
    if (at && wanted > 0 && type == 3) memset(at, 0, 8 * wanted);  // 64-bit integers, as sizes are
    return 0;
}

#endif
