// CUDA's driver and runtime compiler as one library, for a machine without either: the compiler makes kernels code of this
// CPU with g++, the driver's memory is the machine's, and a launch runs block after block. It proves what the kernels mean;
// neither how fast they are nor that the real driver takes them.
//
// `CUDA_ON_CPU` names a folder with the headers in `include`, where compiled kernels are kept too. Is `CUDA_ON_CPU_NVRTC` the
// path of NVIDIA's own compiler, which needs no GPU, every kernel must be good for it also, for the architecture that is asked
// for and for `sm_80`. `CUDA_ON_CPU_ORDER=backwards` runs the last unit of a block first. What is wrong on a GPU too ends the
// program: units that wait at different barriers, or for one that has ended, and fragments that are not aligned. Memory is NaN
// before it is written.
#include "cuda_runtime.h"
#include <dlfcn.h>
#include <fstream>
#include <map>
#include <mutex>
#include <regex>
#include <sstream>
#include <string>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

namespace {
using std::string;

/// Ends the program with what a kernel did wrong.
[[noreturn]] void wrong(const string &what) {
    std::fprintf(stderr, "CUDA on the CPU: %s\n", what.c_str());
    std::abort();
}

string variable(const char *name) {
    const char *value = std::getenv(name);
    return value ? value : "";
}

// ---- Units as fibres.

constexpr size_t STACK = 256 << 10, MOST_UNITS = 1024;

struct Fibre {
    void *at;
    dim3 thread;
    enum { Ready, AtBlock, AtWarp, Done } state;
    int place;
};

emulation::Unit shared;
Fibre fibres[MOST_UNITS];
size_t running;
void *scheduler;
void (*entry)(void **);
void **arguments;

extern "C" void switch_stacks(void **from, void *to);
asm(R"(
switch_stacks:
    push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
    ret
)");

void leave(decltype(Fibre::state) state, int place) {
    Fibre &own = fibres[running];
    own.state = state, own.place = place;
    switch_stacks(&own.at, scheduler);
}

void wait(bool warp, int place) { leave(warp ? Fibre::AtWarp : Fibre::AtBlock, place); }

void start() {
    entry(arguments);
    leave(Fibre::Done, 0);
}

char *stack(size_t unit) {
    static char *all = static_cast<char *>(
        mmap(nullptr, STACK * MOST_UNITS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    return all + STACK * unit;
}

/// Lets units go on that all wait at one place. Whether any did.
bool released(size_t begin, size_t end, decltype(Fibre::state) state) {
    int place = -1;
    bool ended = false;
    for (size_t i = begin; i < end; i++) {
        const Fibre &one = fibres[i];
        ended |= one.state == Fibre::Done;
        if (one.state == Fibre::Done) continue;
        if (one.state != state) return false;
        if (place >= 0 && one.place != place) wrong("units wait at barriers of two lines");
        place = one.place;
    }
    if (place >= 0 && ended) wrong("a unit has ended where others wait");
    for (size_t i = begin; i < end; i++)
        if (fibres[i].state == state) fibres[i].state = Fibre::Ready;
    return place >= 0;
}

void run_block(size_t units, bool waits) {
    static const bool backwards = variable("CUDA_ON_CPU_ORDER") == "backwards";
    size_t x = shared.block_dim.x, y = shared.block_dim.y;
    auto thread = [&](size_t i) { return dim3{unsigned(i % x), unsigned(i / x % y), unsigned(i / x / y)}; };
    if (!waits) {
        for (size_t i = 0; i < units; i++) shared.thread = thread(backwards ? units - 1 - i : i), entry(arguments);
        return;
    }
    for (size_t i = 0; i < units; i++) {
        // As if `switch_stacks` had been called by `start`'s caller: six registers and where to return to, the stack 8 bytes off
        // a multiple of 16 at its first instruction.
        void **top = reinterpret_cast<void **>(stack(i) + STACK) - 8;
        top[6] = reinterpret_cast<void *>(start);
        fibres[i] = {top, thread(i), Fibre::Ready, 0};
    }
    for (bool any = true; any;) {
        any = false;
        for (size_t n = 0; n < units; n++) {
            size_t i = backwards ? units - 1 - n : n;
            if (fibres[i].state != Fibre::Ready) continue;
            running = i, shared.thread = fibres[i].thread, any = true;
            switch_stacks(&scheduler, fibres[i].at);
        }
        for (size_t i = 0; i < units; i += 32) any |= released(i, std::min(i + 32, units), Fibre::AtWarp);
        any |= released(0, units, Fibre::AtBlock);
    }
    for (size_t i = 0; i < units; i++)
        if (fibres[i].state != Fibre::Done) wrong("units wait for each other");
}

// ---- The compiler.

struct Program {
    string source, log, result;
};

string run(const string &command, int &status) {
    string text;
    FILE *pipe = popen((command + " 2>&1").c_str(), "r");
    char part[4096];
    while (size_t n = fread(part, 1, sizeof part, pipe)) text.append(part, n);
    status = pclose(pipe);
    return text;
}

/// Where NVIDIA's compiler says no, what it says.
string refused(const Program &program, int count, const char *const *options) {
    static void *library = dlopen(variable("CUDA_ON_CPU_NVRTC").c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_DEEPBIND);
    if (!library) wrong(string("no NVRTC: ") + dlerror());
    auto create = (int (*)(void **, const char *, const char *, int, void *, void *))dlsym(library, "nvrtcCreateProgram");
    auto compile = (int (*)(void *, int, const char *const *))dlsym(library, "nvrtcCompileProgram");
    auto log_size = (int (*)(void *, size_t *))dlsym(library, "nvrtcGetProgramLogSize");
    auto get_log = (int (*)(void *, char *))dlsym(library, "nvrtcGetProgramLog");
    auto destroy = (int (*)(void **))dlsym(library, "nvrtcDestroyProgram");
    string all;
    for (const char *other : {"", "--gpu-architecture=sm_80"}) {
        std::vector<const char *> own(options, options + count);
        for (const char *&option : own)
            if (*other && !std::strncmp(option, "--gpu-arch", 10)) option = other;
        void *one;
        create(&one, program.source.c_str(), nullptr, 0, nullptr, nullptr);
        if (int code = compile(one, count, own.data())) {
            size_t size = 0;
            log_size(one, &size);
            string log(size, 0);
            get_log(one, log.data());
            all += "NVRTC " + std::to_string(code) + ": " + log;
        }
        destroy(&one);
    }
    return all;
}

/// Makes a shared library of a kernel, unless there is one. Its names are its own: a kernel may be called as a function of C is.
bool compile(Program &program, int count, const char *const *options) {
    string folder = variable("CUDA_ON_CPU"), kept = folder + "/kept";
    if (folder.empty()) wrong("`CUDA_ON_CPU` names no folder");
    mkdir(kept.c_str(), 0777);
    bool real = !variable("CUDA_ON_CPU_NVRTC").empty();
    std::smatch name;
    static const std::regex signature(R"(__launch_bounds__\(\d+\)\s*(\w+)\s*\()");
    if (!std::regex_search(program.source, name, signature)) wrong("a source without a kernel");
    string text = program.source + "\n#undef __shared__\n"
        "__align__(128) uint8 dynamic_shared_mem[256 << 10];\nemulation::Unit *emulation::unit;\n"
        "extern \"C\" void *emulation_shared() { return dynamic_shared_mem; }\n"
        "extern \"C\" void emulation_set(emulation::Unit *unit) { emulation::unit = unit; }\n"
        "extern \"C\" bool emulation_waits() { return " +
        string(program.source.find("__sync") != string::npos ? "true" : "false") + "; }\n"
        "extern \"C\" void emulation_call(void **arguments) { emulation::call(" + name[1].str() + ", arguments); }\n";
    string own = kept + "/" + std::to_string(std::hash<string>()(text)), library = own + ".so";
    string part = own + "." + std::to_string(getpid());
    if (access((own + ".cpp").c_str(), F_OK)) {
        if (real) program.log = refused(program, count, options);
        if (!program.log.empty()) return false;
        std::ofstream(part + ".cpp") << text;
        int status;
        program.log = run("g++ -std=c++20 -O1 -march=native -fno-strict-aliasing -w -shared -fPIC -Wl,-Bsymbolic -I" + folder + "/include -o " + part +
                              ".so " + part + ".cpp", status);
        if (status) return false;
        rename((part + ".so").c_str(), library.c_str());
        rename((part + ".cpp").c_str(), (own + ".cpp").c_str());
    }
    program.result = library;
    return true;
}

// ---- The driver.

struct Function {
    void (*call)(void **);
    char *memory;
    int most_shared;
    bool waits;
};

std::mutex one_at_a_time;
std::map<uintptr_t, size_t> sizes;
size_t used;
constexpr size_t TOTAL = size_t(139) << 30, MOST_SHARED = 227 << 10;

int allocate(uintptr_t *to, size_t bytes) {
    std::lock_guard lock(one_at_a_time);
    if (!bytes || used + bytes > TOTAL) return bytes ? 2 : 1;
    void *at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) return 2;
    // What nobody has written is NaN, and no valid index.
    if (bytes <= 64 << 20) std::memset(at, 0xff, bytes);
    *to = reinterpret_cast<uintptr_t>(at);
    sizes[*to] = bytes, used += bytes;
    return 0;
}

int release(uintptr_t at) {
    std::lock_guard lock(one_at_a_time);
    auto known = sizes.find(at);
    if (known == sizes.end()) return 1;
    munmap(reinterpret_cast<void *>(at), known->second);
    used -= known->second;
    sizes.erase(known);
    return 0;
}

int copy(void *to, const void *from, size_t bytes) {
    std::lock_guard lock(one_at_a_time);
    std::memcpy(to, from, bytes);
    return 0;
}

int attribute(int which) {
    switch (which) {
    case 1: return 1024;                    // Units of a block,
    case 2: case 3: return 1024;            // along each dim
    case 4: return 64;
    case 5: return 2147483647;              // Blocks
    case 6: case 7: return 65535;
    case 8: return 48 << 10;                // Shared memory
    case 97: return MOST_SHARED;
    case 10: return 32;                     // Units of a warp
    case 16: return 132;                    // Multiprocessors
    case 75: return 9;                      // Compute capability
    case 76: return 0;
    case 115: return 1;                     // Pools of memory
    default: return 0;
    }
}
} // namespace

extern "C" {
int nvrtcVersion(int *major, int *minor) { return *major = 12, *minor = 9, 0; }
int nvrtcCreateProgram(Program **to, const char *source, const char *, int, void *, void *) { return *to = new Program{source}, 0; }
int nvrtcDestroyProgram(Program **program) { return delete *program, 0; }
int nvrtcCompileProgram(Program *program, int count, const char *const *options) {
    return compile(*program, count, options) ? 0 : 6;
}
int nvrtcGetProgramLogSize(Program *program, size_t *size) { return *size = program->log.size() + 1, 0; }
int nvrtcGetProgramLog(Program *program, char *to) { return std::strcpy(to, program->log.c_str()), 0; }
int nvrtcGetPTXSize(Program *program, size_t *size) { return *size = program->result.size() + 1, 0; }
int nvrtcGetPTX(Program *program, char *to) { return std::strcpy(to, program->result.c_str()), 0; }

int cuInit(unsigned) { return 0; }
/// What NVRTC asks for; there is none.
int cuGetExportTable(const void **, const void *) { return 500; }
int cuDeviceGetCount(int *to) { return *to = 1, 0; }
int cuDeviceGet(int *to, int ordinal) { return *to = ordinal, ordinal ? 101 : 0; }
int cuDeviceGetName(char *to, int len, int) { return std::snprintf(to, len, "CUDA on the CPU, an emulation"), 0; }
int cuDeviceGetAttribute(int *to, int which, int) { return *to = attribute(which), 0; }
int cuDeviceTotalMem_v2(size_t *to, int) { return *to = TOTAL, 0; }
int cuMemGetInfo_v2(size_t *left, size_t *total) { return *left = TOTAL - used, *total = TOTAL, 0; }
int cuDevicePrimaryCtxRetain(void **to, int) { return *to = &shared, 0; }
int cuDevicePrimaryCtxRelease_v2(int) { return 0; }
int cuCtxSetCurrent(void *) { return 0; }
int cuCtxGetCurrent(void **to) { return *to = &shared, 0; }
int cuCtxSynchronize() { return 0; }
int cuStreamCreate(void **to, unsigned) { return *to = &shared, 0; }
int cuStreamDestroy_v2(void *) { return 0; }
int cuStreamSynchronize(void *) { return 0; }
int cuStreamWaitEvent(void *, void *, unsigned) { return 0; }
int cuEventCreate(void **to, unsigned) { return *to = &shared, 0; }
int cuEventRecord(void *, void *) { return 0; }
int cuEventQuery(void *) { return 0; }
int cuEventSynchronize(void *) { return 0; }
int cuEventDestroy_v2(void *) { return 0; }
int cuGetErrorName(int, const char **to) { return *to = "an error of the emulation", 0; }
int cuGetErrorString(int, const char **to) { return *to = "an error of the emulation", 0; }

int cuMemAlloc_v2(uintptr_t *to, size_t bytes) { return allocate(to, bytes); }
int cuMemAllocAsync(uintptr_t *to, size_t bytes, void *) { return allocate(to, bytes); }
int cuMemFree_v2(uintptr_t at) { return release(at); }
int cuMemFreeAsync(uintptr_t at, void *) { return release(at); }
int cuMemAllocHost_v2(void **to, size_t bytes) { return *to = std::malloc(bytes), 0; }
int cuMemFreeHost(void *at) { return std::free(at), 0; }
int cuMemcpyHtoDAsync_v2(void *to, const void *from, size_t bytes, void *) { return copy(to, from, bytes); }
int cuMemcpyDtoHAsync_v2(void *to, const void *from, size_t bytes, void *) { return copy(to, from, bytes); }
int cuMemcpyDtoDAsync_v2(void *to, const void *from, size_t bytes, void *) { return copy(to, from, bytes); }

/// What is copied row by row, as the driver describes it.
struct Copy2D {
    size_t from_x, from_y;
    int from_kind;
    const char *from_host, *from_device;
    void *from_array;
    size_t from_pitch, to_x, to_y;
    int to_kind;
    char *to_host, *to_device;
    void *to_array;
    size_t to_pitch, width, height;
};
int cuMemcpy2DAsync_v2(const Copy2D *what, void *) {
    const char *from = what->from_kind == 1 ? what->from_host : what->from_device;
    char *to = what->to_kind == 1 ? what->to_host : what->to_device;
    for (size_t y = 0; y < what->height; y++)
        copy(to + (what->to_y + y) * what->to_pitch + what->to_x, from + (what->from_y + y) * what->from_pitch + what->from_x,
             what->width);
    return 0;
}

int cuModuleLoadData(void **to, const char *image) {
    *to = dlopen(image, RTLD_NOW | RTLD_LOCAL);
    return *to ? 0 : 200;
}
int cuModuleUnload(void *) { return 0; }
int cuModuleGetFunction(Function **to, void *module, const char *) {
    auto find = [&](const char *name) { return dlsym(module, name); };
    ((void (*)(emulation::Unit *))find("emulation_set"))(&shared);
    *to = new Function{(void (*)(void **))find("emulation_call"), ((char *(*)())find("emulation_shared"))(), 48 << 10,
                       ((bool (*)())find("emulation_waits"))()};
    return 0;
}
int cuFuncSetAttribute(Function *function, int which, int value) {
    if (which == 8) function->most_shared = value;
    return which == 8 && size_t(value) > MOST_SHARED ? 1 : 0;
}
int cuLaunchKernel(Function *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned memory,
                   void *, void **own, void **) {
    std::lock_guard lock(one_at_a_time);
    size_t units = size_t(bx) * by * bz;
    bool good = gx && gy && gz && gy <= 65535 && gz <= 65535 && units && units <= MOST_UNITS && int(memory) <= function->most_shared;
    if (!good) return 1;
    shared.block_dim = {bx, by, bz}, shared.grid_dim = {gx, gy, gz}, shared.wait = wait;
    entry = function->call, arguments = own;
    for (unsigned z = 0; z < gz; z++)
        for (unsigned y = 0; y < gy; y++)
            for (unsigned x = 0; x < gx; x++) {
                shared.block = {x, y, z};
                std::memset(function->memory, 0xff, memory);
                run_block(units, function->waits);
            }
    return 0;
}
}
