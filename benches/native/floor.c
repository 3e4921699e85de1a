// What trapline is measured against: the loop that calls, and pokes through an alias of the text without any bookkeeping.
#define _GNU_SOURCE
#include <linux/membarrier.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

// Calls `function` `calls` times, each with the result of the one before.
long bench_call_loop(long (*function)(long), long calls) {
    long value = 0;
    for (long call = 0; call < calls; call++) value = function(value);
    return value;
}

// A thread that calls a function until it is told to stop.
static atomic_int running;
static pthread_t caller;

static void *call_all_the_time(void *function) {
    while (atomic_load_explicit(&running, memory_order_relaxed)) ((void (*)(void))function)();
    return 0;
}

int bench_start_caller(void *function) {
    atomic_store(&running, 1);
    return pthread_create(&caller, 0, call_all_the_time, function);
}

void bench_stop_caller(void) {
    atomic_store(&running, 0);
    pthread_join(caller, 0);
}

// The floor of a poke: the three-phase protocol on `sites` sites, 16 bytes apart, written through a writable alias of the same memory.
enum { STRIDE = 16, CALL = 5 };
static uint8_t *text, *alias;
static size_t text_bytes;
static const uint8_t nop[CALL] = {0x0f, 0x1f, 0x44, 0, 0};

static void skip_site(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)info;
#ifdef __x86_64__
    ((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP] += CALL - 1;
#else
    ((ucontext_t *)context)->uc_mcontext.gregs[REG_EIP] += CALL - 1;
#endif
}

// Makes the sites and returns the first one's address, or null.
void *floor_make_sites(size_t sites) {
    text_bytes = sites * STRIDE;
    int memory = memfd_create("sites", MFD_CLOEXEC);
    if (memory < 0 || ftruncate(memory, (off_t)text_bytes)) return 0;
    text = mmap(0, text_bytes, PROT_READ | PROT_EXEC, MAP_SHARED, memory, 0);
    alias = mmap(0, text_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    close(memory);
    if (text == MAP_FAILED || alias == MAP_FAILED) return 0;
    for (size_t site = 0; site < sites; site++) {
        memcpy(alias + site * STRIDE, nop, CALL);
        alias[site * STRIDE + CALL] = 0xc3;
    }
    struct sigaction action = {.sa_sigaction = skip_site, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGTRAP, &action, 0);
    syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE, 0, 0);
    return text;
}

void floor_drop_sites(void) {
    munmap(text, text_bytes);
    munmap(alias, text_bytes);
}

static void sync_cores(void) { syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED_SYNC_CORE, 0, 0); }

// Makes the first `sites` sites calls of `target`, or nops if it is null.
void floor_poke(size_t sites, void *target) {
    for (size_t site = 0; site < sites; site++) alias[site * STRIDE] = 0xcc;
    sync_cores();
    for (size_t site = 0; site < sites; site++) {
        int32_t distance = (int32_t)((intptr_t)target - (intptr_t)(text + site * STRIDE + CALL));
        memcpy(alias + site * STRIDE + 1, target ? (void *)&distance : (void *)(nop + 1), CALL - 1);
    }
    sync_cores();
    for (size_t site = 0; site < sites; site++) alias[site * STRIDE] = target ? 0xe8 : nop[0];
    sync_cores();
}
