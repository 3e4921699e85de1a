// Open files: which numbers there are, what they are, and that closing all of them changes nothing for traced functions.
#include "check.h"
#include <dirent.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>

TRACED long work(long value) { return value * 3 + 1; }

static void list(const char *when) {
    DIR *folder = opendir("/proc/self/fd");
    EXPECT(folder);
    for (struct dirent *entry; (entry = readdir(folder));) {
        if (entry->d_name[0] == '.' || atoi(entry->d_name) == dirfd(folder)) continue;
        struct stat what;
        EXPECT(fstat(atoi(entry->d_name), &what) == 0);
        printf("%s: %s kind %o flags %x\n", when, entry->d_name, what.st_mode & S_IFMT, fcntl(atoi(entry->d_name), F_GETFD));
    }
    closedir(folder);
}

int main(void) {
    list("start");
    int file = open("/dev/null", O_RDWR);
    printf("next is %d\n", file);
    long sum = 0;
    for (int times = 0; times < 10000; times++) sum = work(sum) % 1000;
    closefrom(3);
    for (int number = 3; number < 1024; number++) close(number);
    for (int times = 0; times < 30000; times++) sum = work(sum) % 1000;
    for (int number = 3; number < 60; number++) EXPECT(open("/dev/null", O_RDWR) == number);
    for (int times = 0; times < 10000; times++) sum = work(sum) % 1000;
    list("end");
    printf("sum %ld\n", sum);
    tell_calls("work", 50000);
    return 0;
}
