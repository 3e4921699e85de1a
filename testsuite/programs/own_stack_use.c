// Functions that look at their frames: __builtin_return_address, __builtin_frame_address, alloca, variable arrays, getcontext, backtracking by frame
// pointers, and code that the program made itself at run time.
#include "check.h"
#include <alloca.h>
#include <dlfcn.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

TRACED const char *who_called(void) {
    Dl_info info;
    void *from = __builtin_extract_return_addr(__builtin_return_address(0));
    return dladdr((char *)from - 1, &info) && info.dli_sname ? info.dli_sname : "?";
}

TRACED long uses_alloca(long size) {
    char *room = alloca((size_t)size);
    memset(room, 7, (size_t)size);
    char more[size + 1];
    memset(more, 1, sizeof more);
    return room[size - 1] + more[size];
}

TRACED const char *outer(void) {
    const char *name = who_called();
    __asm__("" ::: "memory");
    return name;
}

TRACED long twice(void) {
    volatile long times = 0;
    ucontext_t context;
    getcontext(&context);
    if (++times < 5) setcontext(&context);
    return times;
}

TRACED long called_by_generated(long value) { return value + 5; }

int main(void) {
    printf("%s\n", outer());
    long sum = 0;
    for (long size = 1; size < 2000; size += 7) sum += uses_alloca(size);
    printf("sum %ld twice %ld\n", sum, twice());
    unsigned char *code = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    long (*function)(long) = called_by_generated;
#ifdef __i386__
    // mov eax, function; jmp eax
    code[0] = 0xb8, code[5] = 0xff, code[6] = 0xe0;
    memcpy(code + 1, &function, 4);
#else
    // movabs rax, function; jmp rax
    code[0] = 0x48, code[1] = 0xb8, code[10] = 0xff, code[11] = 0xe0;
    memcpy(code + 2, &function, 8);
#endif
    EXPECT(mprotect(code, 4096, PROT_READ | PROT_EXEC) == 0);
    for (long value = 0; value < 100; value++) EXPECT(((long (*)(long))code)(value) == value + 5);
    tell_calls("called_by_generated", 100);
    tell_calls("uses_alloca", 286);
    return 0;
}
