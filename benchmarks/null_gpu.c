// A GPU that computes nothing: what torch asks of CUDA, answered without one.
//
// Memory is address space that nobody touches, copies from the device bring the zeros it begins
// with, all other calls succeed and do nothing. What is asked for and not written out here,
// benchmarks/null_gpu.py adds: functions that return success. Compiled twice: as CUDA's runtime with
// cuBLAS, cuDNN and NCCL, and with -DDRIVER as its driver, which Triton and the inductor ask.
//
// Of several ranks each has a device. NCCL carries nothing, but whoever waits for a device waits until
// all ranks have called as many collectives as this one had: for one that is gone, for ever, unless
// NULL_GPU_TELLS=1 makes NCCL say so. A rank that touches another's device, or calls another
// collective than the others, says so and aborts.

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))
#define MEMORY (141ull << 30)  // an H200's
#define PROCESSORS 132
#define SHARED 232448
#define AREA (1ull << 40)  // addresses of the host's pinned memory, then of each device's
#define DEVICES 16
#define RANKS 256
#define LAST 65536

static int number(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}
static int devices(void) { return number("NULL_GPUS", 1); }

// what the driver asks the runtime
API int null_gpu_state(int device, unsigned *flags, int *active);
API int null_gpu_current(void);

#ifdef DRIVER

static int success(void) { return 0; }

API CUresult cuDeviceGetCount(int *count) { return *count = devices(), 0; }
API CUresult cuDeviceGet(CUdevice *device, int number) { return *device = number, 0; }
API CUresult cuDriverGetVersion(int *version) { return *version = CUDA_VERSION, 0; }
API CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, 0; }
API CUresult cuCtxGetDevice(CUdevice *device) { return *device = null_gpu_current(), 0; }
API CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, 0; }
API CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    return *context = (CUcontext)1, 0;
}
API CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    return null_gpu_state(device, flags, active);
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

static __thread int current;
static int used[DEVICES];  // whether this process has a context there

static int success(void) { return 0; }
API int null_gpu_state(int device, unsigned *flags, int *active) {
    return *flags = 0, *active = used[device], 0;
}
API int null_gpu_current(void) { return current; }

static int here(void) {
    static int own = -2;  // not asked for yet
    if (own == -2) own = number("LOCAL_RANK", -1);
    if (own >= 0 && current != own) {
        fprintf(stderr, "null GPU: the rank of device %d is at work on device %d\n", own, current);
        abort();
    }
    return used[current] = 1, current;
}

static char *memory(void) {
    static char *begin;
    return begin ? begin : (begin = mmap(0, AREA * (1 + DEVICES), PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
}

static void *reserved(int area, size_t size) {
    static size_t taken[1 + DEVICES];
    size_t before = __atomic_fetch_add(&taken[area], size + 4095 & ~4095ull, __ATOMIC_RELAXED);
    return memory() + area * AREA + before;
}

static struct {
    int process[RANKS];
    long called[RANKS];         // collectives
    unsigned long which[LAST];  // the last of them: number and what it is
} *ranks;
static long called;

static int all_called(long count) {
    for (int rank = 0; ranks && rank < number("WORLD_SIZE", 1); rank++)
        if (__atomic_load_n(&ranks->called[rank], __ATOMIC_ACQUIRE) < count) return 0;
    return 1;
}
static cudaError_t waited(long count) {
    while (!all_called(count)) usleep(100);
    return 0;
}

static void join(void) {
    char name[4096];
    snprintf(name, sizeof name, "%s/ranks-%d-%d", getenv("NULL_GPU"), number("MASTER_PORT", 0),
             number("TORCHELASTIC_RESTART_COUNT", 0));
    int file = open(name, O_RDWR | O_CREAT, 0600);
    ftruncate(file, sizeof *ranks);
    ranks = mmap(0, sizeof *ranks, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    ranks->process[number("RANK", 0)] = getpid();
}

static int collective(int kind, size_t count, int type) {
    here();
    if (!ranks) join();
    long mine = __atomic_add_fetch(&called, 1, __ATOMIC_RELAXED);
    unsigned long what = mine << 40 | (count * 128 + type * 8 + kind & (1ul << 40) - 1);
    unsigned long *place = &ranks->which[mine % LAST], first = *place;
    while (first >> 40 != mine && !__atomic_compare_exchange_n(place, &first, what, 0,
                                                               __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
        continue;
    if (first >> 40 == mine && first != what) {
        fprintf(stderr, "null GPU: collective %ld of rank %d is another one than others'\n", mine,
                number("RANK", 0));
        abort();
    }
    __atomic_store_n(&ranks->called[number("RANK", 0)], mine, __ATOMIC_RELEASE);
    return 0;
}

static cudaError_t copied(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    if (kind == cudaMemcpyDeviceToHost) memcpy(to, from, size);
    return 0;
}

API cudaError_t cudaGetDeviceCount(int *count) { return *count = devices(), 0; }
API cudaError_t cudaGetDevice(int *device) { return *device = current, 0; }
API cudaError_t cudaSetDevice(int device) { return current = device, here(), 0; }
API cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { return *can = 0, 0; }
API cudaError_t cudaDeviceSynchronize(void) { return waited(called); }
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
API cudaError_t cudaMalloc(void **pointer, size_t size) {
    return *pointer = reserved(1 + here(), size), 0;
}
API cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
    return here(), *pointer = reserved(0, size), 0;
}
API cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    return waited(called), copied(to, from, size, kind);
}
API cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind,
                                cudaStream_t stream) {
    return copied(to, from, size, kind);
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    return *least = 0, *greatest = -5, 0;
}
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    return here(), *stream = malloc(1), 0;
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
API cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return waited(called); }
API cudaError_t cudaStreamQuery(cudaStream_t stream) {
    return all_called(called) ? 0 : cudaErrorNotReady;
}
API cudaError_t cudaEventCreate(cudaEvent_t *event) { return *event = calloc(1, 8), 0; }
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    return *event = calloc(1, 8), 0;
}
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return here(), *(long *)event = called, 0;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    return cudaEventRecord(event, stream);
}
API cudaError_t cudaEventSynchronize(cudaEvent_t event) { return waited(*(long *)event); }
API cudaError_t cudaEventQuery(cudaEvent_t event) {
    return all_called(*(long *)event) ? 0 : cudaErrorNotReady;
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
    size_t area = (size_t)((char *)pointer - memory()) / AREA;
    if (area > DEVICES) return 0;  // nobody's
    found->type = area ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
    found->device = area ? area - 1 : 0;
    return 0;
}
API cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function,
                                                 unsigned version, unsigned long long flags,
                                                 enum cudaDriverEntryPointQueryResult *result) {
    *function = strstr(name, "PrimaryCtxGetState") ? (void *)null_gpu_state : (void *)success;
    if (result) *result = cudaDriverEntryPointSuccess;
    return 0;
}
API int __cudaLaunchKernel() { return here(), 0; }

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

#define COLLECTIVE(name, kind)                                         \
    API int name(const void *from, void *to, size_t count, int type) { \
        return collective(kind, count, type);                          \
    }
COLLECTIVE(ncclAllReduce, 1)
COLLECTIVE(ncclAllGather, 2)
COLLECTIVE(ncclReduceScatter, 3)
COLLECTIVE(ncclBroadcast, 4)
COLLECTIVE(ncclAlltoAll, 5)
API int ncclGetVersion(int *version) { return *version = NCCL, 0; }
API int ncclCommInitRankConfig(void **comm) { return here(), *comm = calloc(1, 4096), 0; }
API int ncclCommSplit(void *of, int color, int key, void **comm) {
    return here(), *comm = calloc(1, 4096), 0;
}
API int ncclCommGetAsyncError(void *comm, int *error) {
    *error = 0;
    if (ranks && number("NULL_GPU_TELLS", 0))
        for (int rank = 0; rank < number("WORLD_SIZE", 1); rank++)
            if (ranks->process[rank] && kill(ranks->process[rank], 0)) *error = 6;  // a remote one
    return 0;
}
API int ncclCommAbort(void *comm) { return ranks = 0, 0; }
API int ncclRedOpCreatePreMulSum(int *op) { return *op = 5, 0; }
API const char *ncclGetErrorString(int error) { return ""; }
API const char *ncclGetLastError(void *comm) { return ""; }

#endif
