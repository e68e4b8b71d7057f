/* Preloaded into a job and its tools: counts the calls that change files below given folders, in one number for all
 * processes, and spoils one of them. tests/test_write_boundaries.py builds it, tests/spoilt_jobs.py reads it.
 *
 * A boundary is a call that makes, fills, renames, links, cuts or removes a file, maps it for writing, or makes that
 * last (fsync, msync, close); not one that has nothing to do, as to remove what is not there. Of the writes to one
 * opened file the 1st, 4th, 16th, 64th … count. Syncs are counted but not done: no power fails here, and a disk shared
 * with other work takes seconds for each.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum fault { NONE, KILLED, TERMINATED, DISK_FULL, IO_ERROR };

struct shared { /* as in tests/job_server.py */
  atomic_int count;
  atomic_int happened;
  int target, fault, job;
};

static struct shared *shared;
static char log_path[PATH_MAX], roots[4 * PATH_MAX];

#define FDS 4096
static struct { int written; unsigned writes; } files[FDS];

#define MAPS 256
static struct { char *start; size_t length; char path[512]; } maps[MAPS];
static atomic_int mapped;

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

/* Begins counting: `state` is a file that holds a struct shared, `below` are folders separated by colons. */
void watch(const char *state, const char *log, const char *below) {
  int fd = syscall(SYS_openat, AT_FDCWD, state, O_RDWR | O_CLOEXEC, 0);
  if (fd < 0) return;
  void *found = (void *)syscall(SYS_mmap, 0, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  syscall(SYS_close, fd);
  if (found == MAP_FAILED) return;
  snprintf(log_path, sizeof log_path, "%s", log);
  snprintf(roots, sizeof roots, "%s", below);
  shared = found;
}

__attribute__((constructor)) static void from_environment(void) {
  const char *state = getenv("WRITE_BOUNDARIES_STATE"), *log = getenv("WRITE_BOUNDARIES_LOG");
  const char *below = getenv("WRITE_BOUNDARIES_ROOTS");
  if (state && log && below) watch(state, log, below);
}

static int watched(const char *path) {
  for (const char *root = roots; *root;) {
    size_t length = strcspn(root, ":");
    if (!strncmp(path, root, length) && (path[length] == '/' || !path[length])) return 1;
    root += length + (root[length] == ':');
  }
  return 0;
}

static const char *path_of_fd(int fd, char *to) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, to, PATH_MAX - 1);
  to[length > 0 ? length : 0] = 0;
  return to;
}

static const char *path_at(int folder, const char *path, char *to) {
  if (!path) return "";
  if (path[0] == '/') return path;
  char base[PATH_MAX];
  if (folder == AT_FDCWD)
    base[syscall(SYS_getcwd, base, sizeof base) > 0 ? strlen(base) : 0] = 0;
  else
    path_of_fd(folder, base);
  snprintf(to, PATH_MAX, "%.2000s/%.2000s", base, path);
  return to;
}

static int needs_room(const char *call) {
  static const char *calls[] = {"create", "write", "mkdir", "link", "symlink", "resize"};
  for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
    if (!strcmp(call, calls[i])) return 1;
  return 0;
}

static void note(int number, const char *call, const char *path, int is_spoilt) {
  char line[PATH_MAX + 100];
  int length = snprintf(line, sizeof line, "%d\t%d\t%s\t%s\t%s\n", number, (int)syscall(SYS_getpid), call, path,
                        is_spoilt ? "spoilt" : "");
  int fd = syscall(SYS_openat, AT_FDCWD, log_path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
  if (fd >= 0) {
    syscall(SYS_write, fd, line, length);
    syscall(SYS_close, fd);
  }
}

static int exists(const char *path) { return !syscall(SYS_faccessat, AT_FDCWD, path, F_OK); }

static int is_in_vain(const char *call, const char *path) {
  if (!strcmp(call, "mkdir")) return exists(path);
  if (strcmp(call, "unlink") && strcmp(call, "rmdir")) return 0;
  struct stat found;
  return syscall(SYS_newfstatat, AT_FDCWD, path, &found, AT_SYMLINK_NOFOLLOW) != 0;
}

/* 0, or the error that the call has to fail with. */
static int boundary(const char *call, const char *path) {
  if (!shared || !watched(path) || is_in_vain(call, path)) return 0;
  int number = atomic_fetch_add(&shared->count, 1) + 1;
  int is_spoilt = number == shared->target; /* asked once: the job changes it while other threads write */
  note(number, call, path, is_spoilt);
  if (shared->happened && shared->fault == DISK_FULL) return needs_room(call) ? ENOSPC : 0;
  if (!is_spoilt) return 0;
  shared->happened = 1;
  switch (shared->fault) {
    case KILLED:
      syscall(SYS_kill, shared->job, SIGKILL);
      for (;;) pause(); /* in a tool, until the job's end ends it */
    case TERMINATED:
      syscall(SYS_kill, shared->job, SIGTERM);
      return 0;
    case DISK_FULL:
      return needs_room(call) ? ENOSPC : 0;
    case IO_ERROR:
      return EIO;
  }
  return 0;
}

static int fails(const char *call, const char *path) {
  int before = errno, error = boundary(call, path);
  errno = error ? error : before;
  return error;
}

static int fails_fd(const char *call, int fd) {
  char path[PATH_MAX];
  if (!shared) return 0;
  int before = errno;
  path_of_fd(fd, path);
  errno = before;
  return fails(call, path);
}

static int fails_write(int fd) {
  if (!shared || fd < 0 || fd >= FDS || !files[fd].written) return 0;
  unsigned number = ++files[fd].writes;
  if (shared->happened && shared->fault == DISK_FULL) return fails_fd("write", fd);
  while (number > 1 && number % 4 == 0) number /= 4;
  return number == 1 ? fails_fd("write", fd) : 0;
}

static int fails_close(int fd) {
  if (!shared || fd < 0 || fd >= FDS || !files[fd].written) return 0;
  files[fd].written = 0;
  return fails_fd("close", fd);
}

static void opened(int fd, int flags) {
  if (fd < 0 || fd >= FDS) return;
  files[fd].written = shared && (flags & O_ACCMODE) != O_RDONLY;
  files[fd].writes = 0;
}

static int fails_open(int folder, const char *path, int flags) {
  char full[PATH_MAX];
  if (!shared || ((flags & O_ACCMODE) == O_RDONLY && !(flags & (O_CREAT | O_TRUNC)))) return 0;
  if ((flags & O_TMPFILE) == O_TMPFILE) return 0; /* has no name */
  path = path_at(folder, path, full);
  int is_new = (flags & O_CREAT) && !exists(path);
  return fails(is_new ? "create" : flags & O_TRUNC ? "empty" : "open", path);
}

#define MODE                                            \
  mode_t mode = 0;                                      \
  if (flags & (O_CREAT | __O_TMPFILE)) {                \
    va_list rest;                                       \
    va_start(rest, flags);                              \
    mode = va_arg(rest, mode_t);                        \
    va_end(rest);                                       \
  }

#define OPEN(name)                                      \
  int name(const char *path, int flags, ...) {          \
    MODE REAL(name);                                    \
    if (fails_open(AT_FDCWD, path, flags)) return -1;   \
    int fd = real(path, flags, mode);                   \
    opened(fd, flags);                                  \
    return fd;                                          \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                        \
  int name(int folder, const char *path, int flags, ...) {  \
    MODE REAL(name);                                        \
    if (fails_open(folder, path, flags)) return -1;         \
    int fd = real(folder, path, flags, mode);               \
    opened(fd, flags);                                      \
    return fd;                                              \
  }
OPENAT(openat)
OPENAT(openat64)

#define CREAT(name)                                                      \
  int name(const char *path, mode_t mode) {                              \
    REAL(name);                                                          \
    if (fails_open(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC)) return -1; \
    int fd = real(path, mode);                                           \
    opened(fd, O_WRONLY);                                                \
    return fd;                                                           \
  }
CREAT(creat)
CREAT(creat64)

#define FOPEN(name)                                                                     \
  FILE *name(const char *path, const char *mode) {                                      \
    REAL(name);                                                                         \
    int plus = strchr(mode, '+') != NULL, how = plus ? O_RDWR : O_WRONLY;               \
    int flags = mode[0] == 'w' ? how | O_CREAT | O_TRUNC : mode[0] == 'a' ? how | O_CREAT : plus ? O_RDWR : 0; \
    if (fails_open(AT_FDCWD, path, flags)) return NULL;                                 \
    FILE *file = real(path, mode);                                                      \
    if (file) opened(fileno(file), flags);                                              \
    return file;                                                                        \
  }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int fd, const void *data, size_t size) {
  REAL(write);
  return fails_write(fd) ? -1 : real(fd, data, size);
}

ssize_t writev(int fd, const struct iovec *data, int count) {
  REAL(writev);
  return fails_write(fd) ? -1 : real(fd, data, count);
}

#define PWRITE(name)                                                       \
  ssize_t name(int fd, const void *data, size_t size, __off64_t offset) {  \
    REAL(name);                                                            \
    return fails_write(fd) ? -1 : real(fd, data, size, offset);            \
  }
PWRITE(pwrite)
PWRITE(pwrite64)

size_t fwrite(const void *data, size_t size, size_t count, FILE *file) {
  REAL(fwrite);
  return fails_write(fileno(file)) ? 0 : real(data, size, count, file);
}

#define SENDFILE(name)                                                        \
  ssize_t name(int to, int from, __off64_t *offset, size_t size) {            \
    ssize_t (*real)(int, int, __off64_t *, size_t) = dlsym(RTLD_NEXT, #name); \
    return fails_write(to) ? -1 : real(to, from, offset, size);               \
  }
SENDFILE(sendfile)
SENDFILE(sendfile64)

ssize_t copy_file_range(int from, __off64_t *start, int to, __off64_t *offset, size_t size, unsigned flags) {
  REAL(copy_file_range);
  return fails_write(to) ? -1 : real(from, start, to, offset, size, flags);
}

int close(int fd) {
  REAL(close);
  int error = fails_close(fd), result = real(fd);
  if (error) errno = error;
  return error ? -1 : result;
}

int fclose(FILE *file) {
  REAL(fclose);
  int error = fails_close(fileno(file)), result = real(file);
  if (error) errno = error;
  return error ? EOF : result;
}

int fsync(int fd) { return fails_fd("sync", fd) ? -1 : 0; }
int fdatasync(int fd) { return fails_fd("sync", fd) ? -1 : 0; }

#define MMAP(name)                                                                               \
  void *name(void *start, size_t length, int protection, int flags, int fd, __off64_t offset) {  \
    REAL(name);                                                                                  \
    int shares = shared && fd >= 0 && (protection & PROT_WRITE) && (flags & MAP_SHARED);         \
    if (shares && fails_fd("map", fd)) return MAP_FAILED;                                        \
    void *found = real(start, length, protection, flags, fd, offset);                            \
    if (shares && found != MAP_FAILED) {                                                         \
      int i = atomic_fetch_add(&mapped, 1) % MAPS;                                               \
      char path[PATH_MAX];                                                                       \
      snprintf(maps[i].path, sizeof maps[i].path, "%.511s", path_of_fd(fd, path));               \
      maps[i].start = found, maps[i].length = length;                                            \
    }                                                                                            \
    return found;                                                                                \
  }
MMAP(mmap)
MMAP(mmap64)

int msync(void *start, size_t length, int flags) {
  for (int i = 0; shared && i < MAPS; i++)
    if (maps[i].start && (char *)start >= maps[i].start && (char *)start < maps[i].start + maps[i].length)
      return fails("sync", maps[i].path) ? -1 : 0;
  REAL(msync);
  return real(start, length, flags);
}

#define RESIZE(name)                                          \
  int name(int fd, __off64_t size) {                          \
    REAL(name);                                               \
    return fails_fd("resize", fd) ? -1 : real(fd, size);      \
  }
RESIZE(ftruncate)
RESIZE(ftruncate64)

static int fails_at(const char *call, int folder, const char *path) {
  char full[PATH_MAX];
  return shared && fails(call, path_at(folder, path, full));
}

int mkdir(const char *path, mode_t mode) {
  REAL(mkdir);
  return fails_at("mkdir", AT_FDCWD, path) ? -1 : real(path, mode);
}

int mkdirat(int folder, const char *path, mode_t mode) {
  REAL(mkdirat);
  return fails_at("mkdir", folder, path) ? -1 : real(folder, path, mode);
}

int rmdir(const char *path) {
  REAL(rmdir);
  return fails_at("rmdir", AT_FDCWD, path) ? -1 : real(path);
}

int unlink(const char *path) {
  REAL(unlink);
  return fails_at("unlink", AT_FDCWD, path) ? -1 : real(path);
}

int unlinkat(int folder, const char *path, int flags) {
  REAL(unlinkat);
  return fails_at(flags & AT_REMOVEDIR ? "rmdir" : "unlink", folder, path) ? -1 : real(folder, path, flags);
}

int rename(const char *from, const char *to) {
  REAL(rename);
  return fails_at("rename", AT_FDCWD, to) ? -1 : real(from, to);
}

int renameat(int from_folder, const char *from, int folder, const char *to) {
  REAL(renameat);
  return fails_at("rename", folder, to) ? -1 : real(from_folder, from, folder, to);
}

int link(const char *from, const char *to) {
  REAL(link);
  return fails_at("link", AT_FDCWD, to) ? -1 : real(from, to);
}

int linkat(int from_folder, const char *from, int folder, const char *to, int flags) {
  REAL(linkat);
  return fails_at("link", folder, to) ? -1 : real(from_folder, from, folder, to, flags);
}

int symlink(const char *from, const char *to) {
  REAL(symlink);
  return fails_at("symlink", AT_FDCWD, to) ? -1 : real(from, to);
}

int symlinkat(const char *from, int folder, const char *to) {
  REAL(symlinkat);
  return fails_at("symlink", folder, to) ? -1 : real(from, folder, to);
}

/* Rust has no function of the C library for this one. */
long syscall(long number, ...) {
  static long (*real)(long, ...);
  if (!real) real = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
  va_list rest;
  va_start(rest, number);
  long a[6];
  for (int i = 0; i < 6; i++) a[i] = va_arg(rest, long);
  va_end(rest);
  if (number == SYS_renameat2 && fails_at("rename", (int)a[2], (const char *)a[3])) return -1;
  return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

/* A full disk says that it is full. */
#define STATVFS(name, kind)                                   \
  int name(const char *path, struct kind *to) {               \
    REAL(name);                                               \
    int result = real(path, to);                              \
    if (!result && shared && shared->happened && shared->fault == DISK_FULL) to->f_bfree = to->f_bavail = 0; \
    return result;                                            \
  }
STATVFS(statvfs, statvfs)
STATVFS(statvfs64, statvfs64)
