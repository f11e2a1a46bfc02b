/* NVML for tests: a machine has the GPUs that the folder $TEST_GPUS has folders for, "0" and so on.
 *
 * Files in there, each with a number or a word: `uuid`, `name`, `total` and `used` (bytes), `processes` (lines of a
 * process id and its bytes). A GPU with a file `lost` answers as one that has fallen off the bus, one with a file
 * `mute` does not tell of its memory, one with a file `closed` is kept from this process by cgroups. Folders "0" and so
 * on in a GPU's are the MIG instances that it is split into. With a file `strict` beside the GPUs none is found by its
 * UUID while one is lost, as NVML's documentation has it; the driver does not begin as long as there is a file `slow`.
 * Nothing computes on them: what a daemon does with what a driver says is tested with this, a driver and CUDA are not.
 *
 * Structures as in pynvml.py of nvidia-ml-py 13.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    SUCCESS = 0,
    NOT_SUPPORTED = 3,
    NO_PERMISSION = 4,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    GPU_IS_LOST = 15,
    MOST = 16,
    MOST_INSTANCES = 7
};

typedef struct {
    unsigned long long total, free, used;
} memory_t;

typedef struct {
    unsigned int pid;
    unsigned long long bytes;
    unsigned int gpu_instance, compute_instance;
} process_t;

/* The handles: of the GPUs, then of the first instance of each, and so on. */
static char handles[MOST * (1 + MOST_INSTANCES)];

static int number(const char *device) { return (int)(device - handles); }

static FILE *open_file(int number, const char *name)
{
    const char *folder = getenv("TEST_GPUS");
    char path[4096], instance[16] = "";
    if (number >= MOST)
        snprintf(instance, sizeof instance, "%d/", number / MOST - 1);
    snprintf(path, sizeof path, "%s/%d/%s%s", folder ? folder : "", number % MOST, instance, name);
    return fopen(path, "r");
}

static int has(int number, const char *name)
{
    FILE *file = open_file(number, name);
    if (file)
        fclose(file);
    return file != NULL;
}

static int word(int number, const char *name, char *text, unsigned int size)
{
    char format[16];
    FILE *file = open_file(number, name);
    snprintf(format, sizeof format, "%%%u[^\n]", size - 1);
    int found = file && fscanf(file, format, text) == 1;
    if (file)
        fclose(file);
    return found ? SUCCESS : NOT_SUPPORTED;
}

static unsigned long long bytes(int number, const char *name)
{
    char text[32] = "0";
    word(number, name, text, sizeof text);
    return strtoull(text, NULL, 10);
}

static int beside(const char *name)
{
    const char *folder = getenv("TEST_GPUS");
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder ? folder : "", name);
    return !access(path, F_OK);
}

static int answer(int number)
{
    return has(number, "closed") ? NO_PERMISSION : has(number, "lost") ? GPU_IS_LOST : SUCCESS;
}

int nvmlInitWithFlags(unsigned int flags)
{
    while (beside("slow"))
        usleep(10000);
    return (void)flags, SUCCESS;
}

int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int error)
{
    switch (error) {
    case GPU_IS_LOST:
        return "GPU is lost";
    case NO_PERMISSION:
        return "Insufficient Permissions";
    case NOT_FOUND:
        return "Not Found";
    default:
        return "Not Supported";
    }
}

int nvmlDeviceGetCount_v2(unsigned int *count)
{
    for (*count = 0; *count < MOST && has(*count, "uuid"); ++*count)
        ;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, char **device)
{
    *device = handles + index;
    return has(index, "uuid") ? answer(index) : NOT_FOUND;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, char **device)
{
    char text[96];
    for (int gpu = 0; beside("strict") && gpu < MOST; ++gpu)
        if (has(gpu, "lost"))
            return GPU_IS_LOST;
    for (int each = 0; each < (int)sizeof handles; ++each)
        if (word(each, "uuid", text, sizeof text) == SUCCESS && !strcmp(text, uuid)) {
            *device = handles + each;
            return answer(each);
        }
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(char *device, char *text, unsigned int size)
{
    return word(number(device), "uuid", text, size);
}

int nvmlDeviceGetName(char *device, char *text, unsigned int size)
{
    return word(number(device), "name", text, size);
}

int nvmlDeviceGetCudaComputeCapability(char *device, int *major, int *minor)
{
    return (void)device, *major = 9, *minor = 0, SUCCESS;
}

int nvmlSystemGetCudaDriverVersion_v2(int *version) { return *version = 13000, SUCCESS; }
int nvmlSystemGetDriverVersion(char *text, unsigned int size) { return snprintf(text, size, "580.1"), SUCCESS; }

int nvmlDeviceGetMaxMigDeviceCount(char *device, unsigned int *count)
{
    return *count = MOST_INSTANCES, number(device) < MOST ? SUCCESS : NOT_SUPPORTED;
}

int nvmlDeviceGetMigDeviceHandleByIndex(char *device, unsigned int index, char **instance)
{
    *instance = device + MOST * (1 + index);
    return has(number(*instance), "uuid") ? SUCCESS : NOT_FOUND;
}

int nvmlDeviceGetMemoryInfo(char *device, memory_t *memory)
{
    if (has(number(device), "lost") || has(number(device), "mute"))
        return GPU_IS_LOST;
    memory->total = bytes(number(device), "total");
    memory->used = bytes(number(device), "used");
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(char *device, unsigned int *count, process_t *processes)
{
    unsigned int room = processes ? *count : 0;
    process_t process = {0};
    FILE *file = open_file(number(device), "processes");
    for (*count = 0; file && fscanf(file, "%u %llu", &process.pid, &process.bytes) == 2; ++*count)
        if (*count < room)
            processes[*count] = process;
    if (file)
        fclose(file);
    return *count > room ? INSUFFICIENT_SIZE : SUCCESS;
}
