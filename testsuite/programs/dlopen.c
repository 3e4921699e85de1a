// A library that comes and goes a hundred times, often to the same place; two that alternate; its functions called each time.
#include "check.h"
#include <dlfcn.h>
#include <string.h>

TRACED long work(long value) { return value * 2 + 1; }

int main(int argc, char **argv) {
    EXPECT(argc == 2);
    long sum = 0;
    for (int round = 0; round < 100; round++) {
        void *library = dlopen(argv[1], round % 2 ? RTLD_NOW : RTLD_LAZY);
        if (!library) printf("%s\n", dlerror());
        EXPECT(library);
        long (*library_work)(long) = (long (*)(long))dlsym(library, "library_work");
        EXPECT(library_work);
        for (int times = 0; times < 50; times++) sum = work(library_work(sum) % 1000);
        EXPECT(dlclose(library) == 0);
        EXPECT(dlopen(argv[1], RTLD_NOW | RTLD_NOLOAD) == NULL);
    }
    EXPECT(dlopen("/nonexistent/library.so", RTLD_NOW) == NULL);
    printf("sum %ld\n", sum);
    tell_calls("work", 100 * 50);
    printf("library calls library_work %d\n", 100 * 50);
    return 0;
}
