// Everything that a program can see of what it was started with.
#include "check.h"
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>

extern char **environ;
TRACED long work(long value) { return value + 1; }

static void show_file(const char *path) {
    char buffer[65536];
    int file = open(path, O_RDONLY);
    EXPECT(file >= 0);
    ssize_t length = 0, more;
    while ((more = read(file, buffer + length, sizeof buffer - (size_t)length)) > 0) length += more;
    close(file);
    printf("%s:", path);
    for (ssize_t byte = 0; byte < length; byte++) putchar(buffer[byte] ? buffer[byte] : ' ');
    printf("\n");
}

// What a constructor sees, before main.
static int constructed_errno, constructed_words;
static char *constructed_preload;
__attribute__((constructor)) static void construct(int argc, char **argv, char **envp) {
    constructed_errno = errno;
    while (envp[constructed_words]) constructed_words++;
    constructed_preload = getenv("LD_PRELOAD");
    (void)argc, (void)argv;
}

int main(int argc, char **argv, char **envp) {
    printf("constructor: errno %d, %d words, preload %s\n", constructed_errno, constructed_words, constructed_preload ? constructed_preload : "none");
    EXPECT(envp == environ && envp == argv + argc + 1);
    for (int word = 0; word < argc; word++) printf("argv %s\n", argv[word]);
    for (char **word = envp; *word; word++) printf("environ %s\n", *word);
    show_file("/proc/self/environ");
    show_file("/proc/self/cmdline");
    show_file("/proc/self/comm");
    EXPECT(getenv("LD_PRELOAD") == NULL || strstr(getenv("LD_PRELOAD"), "trapline") == NULL);
    char executable[4096] = {0};
    EXPECT(readlink("/proc/self/exe", executable, sizeof executable - 1) > 0);
    printf("exe %s\n", executable);
    printf("filename %s\n", (char *)getauxval(AT_EXECFN));
    // The types of the auxiliary vector, without the value that means "ignore".
    ElfW(auxv_t) *entry = (ElfW(auxv_t) *)({
        char **word = envp;
        while (*word) word++;
        word + 1;
    });
    for (; entry->a_type != AT_NULL; entry++) {
        if (entry->a_type == AT_IGNORE) continue;
        int is_address = entry->a_type == AT_PHDR || entry->a_type == AT_SYSINFO || entry->a_type == AT_BASE || entry->a_type == AT_ENTRY || entry->a_type == AT_RANDOM ||
                         entry->a_type == AT_SYSINFO_EHDR || entry->a_type == AT_EXECFN || entry->a_type == AT_PLATFORM;
        printf("auxv %lu %lx\n", (unsigned long)entry->a_type, (unsigned long)(is_address ? entry->a_un.a_val != 0 : entry->a_un.a_val));
    }
    printf("personality %x dumpable %d subreaper-less %d\n", personality(0xffffffff), prctl(PR_GET_DUMPABLE), prctl(PR_GET_PDEATHSIG, &(int){0}));
    printf("priority %d\n", getpriority(PRIO_PROCESS, 0));
    for (int resource = 0; resource < RLIM_NLIMITS; resource++) {
        struct rlimit limit;
        EXPECT(getrlimit(resource, &limit) == 0);
        printf("limit %d %lx %lx\n", resource, limit.rlim_cur, limit.rlim_max);
    }
    char folder[4096];
    printf("folder %s\n", getcwd(folder, sizeof folder));
    printf("umask %o\n", umask(0));
    work(1);
    tell_calls("work", 1);
    return 0;
}
