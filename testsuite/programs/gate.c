// Waits until somebody writes to the pipe `go`, and becomes the program of its arguments.
#include <fcntl.h>
#include <unistd.h>

int main(int count, char **words) {
    char byte;
    int gate = open("go", O_RDONLY | O_CLOEXEC);
    if (count < 2 || gate < 0 || read(gate, &byte, 1) != 1 || unlink("go") != 0)
        return 2;
    execvp(words[1], words + 1);
    return 2;
}
