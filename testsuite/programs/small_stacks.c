// The smallest stacks there are: an alternate signal stack of MINSIGSTKSZ, threads of PTHREAD_STACK_MIN; a stack at both ends of its mapping.
#include "check.h"
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>

static volatile long handled;
TRACED long work(long value) { return value + 1; }

static void handler(int signal) {
    (void)signal;
    handled = work(handled);
}

static void *body(void *value) { return (void *)work((long)value); }

int main(void) {
    size_t bytes = getauxval(AT_MINSIGSTKSZ);
    // What the kernel's frame needs, and 1 KiB for the handler and whoever looks over its shoulder.
    bytes = (bytes ? bytes : 2048) + 1024;
    char *memory = mmap(0, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    stack_t stack = {.ss_sp = memory, .ss_size = bytes};
    EXPECT(sigaltstack(&stack, 0) == 0);
    memset(memory + bytes, 0x5a, 4096);
    struct sigaction action = {.sa_handler = handler, .sa_flags = SA_ONSTACK};
    sigaction(SIGUSR1, &action, 0);
    for (int times = 0; times < 9000; times++) raise(SIGUSR1);
    for (size_t byte = bytes; byte < bytes + 4096; byte++) EXPECT(memory[byte] == 0x5a);
    printf("handled %ld\n", handled);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    EXPECT(pthread_attr_setstacksize(&attributes, PTHREAD_STACK_MIN) == 0);
    void *value = 0;
    for (int thread = 0; thread < 50; thread++) {
        pthread_t created;
        EXPECT(pthread_create(&created, &attributes, body, value) == 0);
        pthread_join(created, &value);
    }
    printf("value %ld\n", (long)value);
    tell_calls("work", 9000 + 50);
    return 0;
}
