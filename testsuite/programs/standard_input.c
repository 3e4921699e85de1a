// Reads what comes on standard input, line by line, and answers; changes folders, and opens by relative paths.
#include "check.h"
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>

TRACED unsigned long hash(const char *line) {
    unsigned long value = 5381;
    for (; *line; line++) value = value * 33 + (unsigned char)*line;
    return value;
}

int main(void) {
    char line[1000];
    long lines = 0;
    unsigned long sum = 0;
    while (fgets(line, sizeof line, stdin)) {
        sum ^= hash(line);
        lines++;
    }
    printf("%ld lines, %lx\n", lines, sum);
    EXPECT(mkdir("below", 0777) == 0 && chdir("below") == 0);
    FILE *file = fopen("file", "w");
    EXPECT(file);
    fprintf(file, "written\n");
    fclose(file);
    EXPECT(chdir("..") == 0);
    file = fopen("below/file", "r");
    EXPECT(file && fgets(line, sizeof line, file));
    printf("%s", line);
    fclose(file);
    EXPECT(unlink("below/file") == 0 && rmdir("below") == 0);
    tell_calls("hash", lines);
    return 0;
}
