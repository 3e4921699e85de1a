// Maps memory that can be written and executed, and keeps it until a file `seen` is there.
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"

int main(void) {
    void *memory = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    EXPECT(memory != MAP_FAILED);
    while (access("seen", F_OK) != 0)
        usleep(1000);
    return 0;
}
