/* A disk that is slow, stands still or fails, for a process that loads this in front of the C library:
 * its syncs wait SYNC_MS milliseconds, and then do what the files in the folder DISK_ORDERS say.
 *
 *   stall   they wait for as long as it is there
 *   fail    they answer EIO; if it names a thread, the next sync of that thread does, and takes the
 *           order away
 *
 * When a sync fails, the time is written to `failed`: microseconds since the Unix epoch, a line each.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

struct path {
  char text[4096];
};

static struct path order(const char *name) {
  struct path path;
  snprintf(path.text, sizeof path.text, "%s/%s", getenv("DISK_ORDERS"), name);
  return path;
}

static int is_to_fail(void) {
  struct path path = order("fail");
  int file = open(path.text, O_RDONLY | O_CLOEXEC);
  if (file < 0) return 0;
  char wanted[16] = "", thread[16] = "";
  ssize_t len = read(file, wanted, sizeof wanted - 1);
  close(file);
  if (len <= 0) return 1;
  pthread_getname_np(pthread_self(), thread, sizeof thread);
  return strcmp(wanted, thread) == 0 && unlink(path.text) == 0;
}

static int fails(void) {
  usleep(1000 * atoi(getenv("SYNC_MS")));
  struct path stall = order("stall");
  while (access(stall.text, F_OK) == 0) usleep(1000);
  if (!is_to_fail()) return 0;
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  int log = open(order("failed").text, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
  dprintf(log, "%lld%06ld\n", (long long)now.tv_sec, now.tv_nsec / 1000);
  close(log);
  errno = EIO;
  return 1;
}

int fdatasync(int fd) { return fails() ? -1 : syscall(SYS_fdatasync, fd); }
int fsync(int fd) { return fails() ? -1 : syscall(SYS_fsync, fd); }
