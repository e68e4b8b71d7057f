/* The driver's library as far as pipeline/cuda_driver.py asks it; what it answers stands in the environment. */

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int answer(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

int cuDriverGetVersion(int *version) {
    *version = answer("CUDA_KNOWN", 13000);
    return 0;
}

int cuInit(unsigned flags) {
    sleep(answer("CUDA_SECONDS", 0));
    return answer("CUDA_ERROR", 0);
}

int cuDeviceGetCount(int *count) {
    *count = answer("CUDA_GPUS", 1);
    return 0;
}

int cuDeviceGet(int *device, int index) {
    *device = 40 + index;
    return 0;
}

int cuDeviceGetName(char *name, int length, int device) {
    strncpy(name, device == 40 ? "NVIDIA L4" : "NVIDIA T4", length);
    return 0;
}

int cuDeviceTotalMem_v2(size_t *bytes, int device) {
    *bytes = 24000000000;
    return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    int capability = answer("CUDA_CAPABILITY", 89);
    *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : -1;
    return 0;
}
