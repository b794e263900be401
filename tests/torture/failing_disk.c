/* Preloaded, makes the n-th call that changes a file below one folder fail, and those after it where that is asked for.

   gcc -shared -fPIC -o failing_disk.so failing_disk.c -ldl */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static char folder[PATH_MAX];
static int at_call, number, lasting, seen;

/* Failures begin with the call `n` (0: none). `error` 0 writes half of what was asked, below 0 it is a signal. */
void disk_fail(const char *below, int n, int error, int last) {
    snprintf(folder, sizeof folder, "%s", below);
    at_call = n, number = error, lasting = last, seen = 0;
}

int disk_calls(void) { return seen; }

static int fails_at(int dir, const char *path) {
    char place[PATH_MAX] = "", link[64];
    if (!folder[0]) return 0;
    if (!path || path[0] != '/') {
        if (path && dir == AT_FDCWD) {
            if (!getcwd(place, sizeof place)) return 0;
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
            ssize_t length = readlink(link, place, sizeof place - 1);
            if (length < 0) return 0;
            place[length] = 0;
        }
        if (path) strncat(place, "/", sizeof place - strlen(place) - 1);
    }
    if (path) strncat(place, path, sizeof place - strlen(place) - 1);
    if (strncmp(place, folder, strlen(folder))) return 0;
    seen++;
    int fails = at_call && (lasting ? seen >= at_call : seen == at_call);
    if (fails && number < 0) kill(getpid(), -number);
    return fails;
}

static int change_fails(int dir, const char *path) { return number && fails_at(dir, path); }

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(real))dlsym(RTLD_NEXT, #name)
#define CHANGE(type, name, parameters, dir, path, ...) \
    type name parameters { \
        REAL(name); \
        if (change_fails(dir, path)) { errno = number; return (type)-1; } \
        return real(__VA_ARGS__); \
    }
#define WRITES (O_WRONLY | O_RDWR | O_CREAT)
#define OPEN(name, parameters, dir, ...) \
    int name parameters { \
        REAL(name); \
        va_list list; \
        va_start(list, flags); \
        mode_t mode = flags & O_CREAT ? va_arg(list, mode_t) : 0; \
        va_end(list); \
        if (flags & WRITES && change_fails(dir, path)) { errno = number; return -1; } \
        return real(__VA_ARGS__); \
    }

OPEN(open, (const char *path, int flags, ...), AT_FDCWD, path, flags, mode)
OPEN(open64, (const char *path, int flags, ...), AT_FDCWD, path, flags, mode)
OPEN(openat, (int dir, const char *path, int flags, ...), dir, dir, path, flags, mode)
OPEN(openat64, (int dir, const char *path, int flags, ...), dir, dir, path, flags, mode)
CHANGE(int, fsync, (int file), file, NULL, file)
CHANGE(int, rename, (const char *from, const char *to), AT_FDCWD, to, from, to)
CHANGE(int, renameat, (int a, const char *from, int b, const char *to), b, to, a, from, b, to)
CHANGE(int, mkdir, (const char *path, mode_t mode), AT_FDCWD, path, path, mode)
CHANGE(ssize_t, sendfile, (int out, int in, off_t *offset, size_t count), out, NULL, out, in, offset, count)
CHANGE(ssize_t, sendfile64, (int out, int in, off_t *offset, size_t count), out, NULL, out, in, offset, count)
CHANGE(ssize_t, copy_file_range, (int in, off64_t *a, int out, off64_t *b, size_t count, unsigned int flags), out, NULL,
       in, a, out, b, count, flags)

ssize_t write(int file, const void *data, size_t count) {
    REAL(write);
    if (fails_at(file, NULL)) {
        if (!number) return real(file, data, count > 1 ? count / 2 : count);
        errno = number;
        return -1;
    }
    return real(file, data, count);
}
