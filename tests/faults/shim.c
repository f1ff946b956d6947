/* System calls that fail on purpose: loaded with LD_PRELOAD, armed by fault_arm() in a forked child.
 *
 * A call counts where its file lies below a path. From the first chosen call on, a number of calls fail.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind {
    NONE, COUNT, SHORT_READ, SHORT_WRITE, INTERRUPT, READ_ERROR, WRITE_ERROR, NO_SPACE, QUOTA,
    SYNC_ERROR, WRITE_NOTHING, RENAME_ERROR, READ_ONLY, VANISH, TRUNCATE, CHANGE
};

static atomic_int armed = NONE;
static atomic_long calls;
static long first, last;
static char below[4096];

void fault_arm(int kind, const char *path, long from, long times) {
    strncpy(below, path, sizeof below - 1);
    first = from;
    last = from + times;
    atomic_store(&calls, 0);
    atomic_store(&armed, kind);
}

long fault_calls(void) { return atomic_load(&calls); }

static int is_below(const char *path) {
    return below[0] && strncmp(path, below, strlen(below)) == 0;
}

static int is_counted(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, 4095);
    if (length <= 0) return 0;
    path[length] = 0;
    return is_below(path);
}

/* Whether this call is one of those that fail. */
static int strikes(void) {
    long number = atomic_fetch_add(&calls, 1);
    return number >= first && number < last;
}

#define REAL(name, type, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

static void spoil(int kind, const char *path) {
    int fd;
    unsigned char byte = 0;
    if (kind == VANISH) unlink(path);
    if (kind == TRUNCATE && truncate(path, 100)) return;
    if (kind == CHANGE && (fd = open(path, O_RDWR)) >= 0) {
        off_t middle = lseek(fd, 0, SEEK_END) / 2;
        static ssize_t (*get)(int, void *, size_t, off_t), (*put)(int, const void *, size_t, off_t);
        get = (ssize_t (*)(int, void *, size_t, off_t))dlsym(RTLD_NEXT, "pread64");
        put = (ssize_t (*)(int, const void *, size_t, off_t))dlsym(RTLD_NEXT, "pwrite64");
        if (get(fd, &byte, 1, middle) == 1) {
            byte ^= 0x41;
            put(fd, &byte, 1, middle);
        }
        close(fd);
    }
}

/* What a read does instead: 0 to go on, -1 to fail, 1 for a short read. */
static int before_read(int fd) {
    char path[4096];
    int kind = atomic_load(&armed);
    int reads = kind == SHORT_READ || kind == READ_ERROR || kind == VANISH || kind == TRUNCATE
        || kind == CHANGE || kind == INTERRUPT || kind == COUNT;
    if (!reads || !is_counted(fd, path) || !strikes()) return 0;
    if (kind == READ_ERROR) { errno = EIO; return -1; }
    if (kind == INTERRUPT && atomic_load(&calls) % 2) { errno = EINTR; return -1; }
    if (kind == SHORT_READ) return 1;
    if (kind == VANISH || kind == TRUNCATE || kind == CHANGE) spoil(kind, path);
    return 0;
}

static int before_write(int fd) {
    char path[4096];
    int kind = atomic_load(&armed);
    int writes = kind == SHORT_WRITE || kind == WRITE_ERROR || kind == NO_SPACE || kind == QUOTA
        || kind == WRITE_NOTHING || kind == INTERRUPT || kind == COUNT;
    if (!writes || !is_counted(fd, path) || !strikes()) return 0;
    if (kind == WRITE_ERROR) { errno = EIO; return -1; }
    if (kind == NO_SPACE) { errno = ENOSPC; return -1; }
    if (kind == QUOTA) { errno = EDQUOT; return -1; }
    if (kind == INTERRUPT && atomic_load(&calls) % 2) { errno = EINTR; return -1; }
    if (kind == SHORT_WRITE) return 1;
    return kind == WRITE_NOTHING ? 2 : 0;
}

static size_t part(size_t count) { return count > 1 ? count / 2 : count; }

ssize_t read(int fd, void *data, size_t count) {
    REAL(read, ssize_t, int, void *, size_t);
    int answer = before_read(fd);
    return answer < 0 ? -1 : real(fd, data, answer ? part(count) : count);
}

static ssize_t read_vector(ssize_t (*real)(int, const struct iovec *, int, off_t), int fd,
                           const struct iovec *parts, int count, off_t at) {
    int answer = before_read(fd);
    if (answer < 0) return -1;
    if (!answer || count < 1) return real(fd, parts, count, at);
    struct iovec one = {parts[0].iov_base, part(parts[0].iov_len)};
    return real(fd, &one, 1, at);
}

ssize_t preadv(int fd, const struct iovec *parts, int count, off_t at) {
    REAL(preadv, ssize_t, int, const struct iovec *, int, off_t);
    return read_vector(real, fd, parts, count, at);
}

ssize_t preadv64(int fd, const struct iovec *parts, int count, off_t at) {
    REAL(preadv64, ssize_t, int, const struct iovec *, int, off_t);
    return read_vector(real, fd, parts, count, at);
}

ssize_t pread64(int fd, void *data, size_t count, off_t at) {
    REAL(pread64, ssize_t, int, void *, size_t, off_t);
    int answer = before_read(fd);
    return answer < 0 ? -1 : real(fd, data, answer ? part(count) : count, at);
}

ssize_t write(int fd, const void *data, size_t count) {
    REAL(write, ssize_t, int, const void *, size_t);
    int answer = before_write(fd);
    return answer < 0 ? -1 : real(fd, data, answer == 1 ? part(count) : count);
}

ssize_t pwrite64(int fd, const void *data, size_t count, off_t at) {
    REAL(pwrite64, ssize_t, int, const void *, size_t, off_t);
    int answer = before_write(fd);
    if (answer == 2) return 0;
    return answer < 0 ? -1 : real(fd, data, answer ? part(count) : count, at);
}

ssize_t pwrite(int fd, const void *data, size_t count, off_t at) {
    return pwrite64(fd, data, count, at);
}

static int sync_fails(int fd) {
    char path[4096];
    int kind = atomic_load(&armed);
    if ((kind != SYNC_ERROR && kind != COUNT) || !is_counted(fd, path) || !strikes()) return 0;
    errno = EIO;
    return kind == SYNC_ERROR;
}

int fsync(int fd) {
    REAL(fsync, int, int);
    return sync_fails(fd) ? -1 : real(fd);
}

int fdatasync(int fd) {
    REAL(fdatasync, int, int);
    return sync_fails(fd) ? -1 : real(fd);
}

int rename(const char *from, const char *to) {
    REAL(rename, int, const char *, const char *);
    if (atomic_load(&armed) == RENAME_ERROR && is_below(to) && strikes()) {
        errno = EIO;
        return -1;
    }
    return real(from, to);
}

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir, int, const char *, mode_t);
    if (atomic_load(&armed) == READ_ONLY && is_below(path) && strikes()) {
        errno = EROFS;
        return -1;
    }
    return real(path, mode);
}
