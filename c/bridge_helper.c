// SPDX-License-Identifier: BSD-2-Clause
/*
 * qsteer-bridge-helper: a tap on a bridge for a QEMU without privileges, -netdev tap,helper= and -netdev bridge,helper=.
 *
 * Theory of operation
 *
 * QEMU starts its helper with "[--use-vnet] --br=BRIDGE --fd=N" and waits for one byte and one fd on the unix socket N.
 * The helper has CAP_NET_ADMIN, from a file capability mostly, and its caller has not: all that the caller can choose is
 * hostile.  That is the command line, N and every other fd, the environment, signals and timers, limits, and when to
 * kill; the working directory, too, but every path here is absolute, and no file is made.  Hence the order:
 *
 * 1. Leave what was inherited: standard streams that are closed, environment, signals, timers, privileges.  What is kept
 *    is CAP_NET_ADMIN, permitted and not yet effective, and the real user and group: the access list is read with the
 *    caller's own rights.
 * 2. Check everything: command line, socket, access list, bridge.  None of it needs or uses a privilege.
 * 3. Make the tap, with CAP_NET_ADMIN.  It is not persistent: whatever ends this process before QEMU has the fd, SIGKILL
 *    included, takes the tap with it.
 * 4. Drop CAP_NET_ADMIN, and send without waiting: a caller that does not read gets nothing to hold on to.
 *
 * Only libc and the kernel's headers; no malloc and no stdio but vsnprintf(), so that a limit of memory is no special
 * case.
 *
 * It does as QEMU's own qemu-bridge-helper does, but for what that one takes and this one refuses:
 * - options that are repeated (there the last one counts), an fd that is not a number (there it is 0) or no unix socket
 *   (there this comes out after the tap is made);
 * - a bridge's name with a ':', which the kernel cuts there, and a bridge's alternative name: with either one gets
 *   around a deny of the bridge;
 * - what the head of bridge_acl.c lists.
 * And --queues=1, --help and --version are not known there.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/ethtool.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/sockios.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

#include "auto.h"
#include "bridge_acl.h"
#include "bridge_args.h"
#include "refusal.h"
#include "send_fd.h"

#ifndef QS_ACL
#define QS_ACL "/etc/qemu/bridge.conf"
#endif

static const char help[] =
	"usage: qsteer-bridge-helper [--use-vnet] --br=BRIDGE --fd=N\n"
	"\n"
	"QEMU starts this, when told to by helper= of -netdev tap or -netdev bridge: it makes a tap\n"
	"of one queue on BRIDGE and sends it over the unix socket N.  It takes CAP_NET_ADMIN, and the\n"
	"leave of " QS_ACL ".\n";
static const char version[] = "qsteer-bridge-helper " QS_VERSION "\n";

/* What was inherited */

/* An fd that is opened later must not become a standard stream. */
static int qs_open_streams(void)
{
	for (int fd = 0; fd <= 2; fd++)
		if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDWR) != fd)
			return -1;
	return 0;
}

/* Timers outlive an exec, and signals stay blocked or ignored over it; QEMU starts its helper with all blocked. */
static void qs_reset_signals(void)
{
	const struct itimerval none = { 0 };
	struct sigaction plain = { .sa_handler = SIG_DFL };
	sigset_t nothing;

	setitimer(ITIMER_REAL, &none, NULL);
	setitimer(ITIMER_VIRTUAL, &none, NULL);
	setitimer(ITIMER_PROF, &none, NULL);
	for (int number = 1; number < NSIG; number++)
		sigaction(number, &plain, NULL); /* the C library's own and SIGKILL refuse */
	sigemptyset(&nothing);
	sigprocmask(SIG_SETMASK, &nothing, NULL);
}

/* Capabilities that are permitted from now on, of those that are, and which of them are effective. */
static int qs_capabilities(__u32 permitted, bool effective)
{
	struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct sets[_LINUX_CAPABILITY_U32S_3];

	if (syscall(SYS_capget, &header, sets))
		return -errno;
	sets[0] = (struct __user_cap_data_struct){ .permitted = sets[0].permitted & permitted };
	sets[0].effective = effective ? sets[0].permitted : 0;
	sets[1] = (struct __user_cap_data_struct){ 0 };
	/* With the inheritable set the ambient one is empty, too. */
	return syscall(SYS_capset, &header, sets) ? -errno : (int)sets[0].permitted;
}

/*
 * Be the caller, if this program is setuid or setgid, and keep what is permitted.  Supplementary groups are hers.  If it
 * is not, the system calls stay untouched: QEMU's -sandbox elevateprivileges=deny kills for them.
 */
static int qs_become_caller(void)
{
	uid_t user = getuid();
	gid_t group = getgid();

	if (user == geteuid() && group == getegid())
		return 0;
	if (prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0) || setresgid(group, group, group) ||
	    setresuid(user, user, user) || prctl(PR_SET_KEEPCAPS, 0, 0, 0, 0))
		return -1;
	return 0;
}

static int qs_drop_privileges(struct qs_refusal *refusal)
{
	if (qs_become_caller() || qs_capabilities(1U << CAP_NET_ADMIN, false) < 0 ||
	    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))
		return qs_refuse(refusal, "cannot drop privileges: %s", strerror(errno));
	return 0;
}

/* What is asked for */

static int qs_check_socket(int fd, struct qs_refusal *refusal)
{
	int domain;
	socklen_t size = sizeof(domain);

	if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size))
		return qs_refuse(refusal, "fd %d is no socket: %s", fd, strerror(errno));
	if (domain != AF_UNIX)
		return qs_refuse(refusal, "fd %d is no unix socket", fd);
	return 0;
}

/* All but the standard streams and one more: too few could be left under a limit of the caller's. */
static void qs_close_others(int kept)
{
	if (kept > 3)
		syscall(SYS_close_range, 3, kept - 1, 0);
	syscall(SYS_close_range, kept < 3 ? 3U : kept + 1U, ~0U, 0);
}

static struct ifreq qs_request(const char *name)
{
	struct ifreq request = { 0 };

	strncpy(request.ifr_name, name, IFNAMSIZ - 1);
	return request;
}

/* Its index is asked for and then the name of that: a device can have several, an access list knows the one. */
static int qs_check_bridge(int control, const char *bridge, struct qs_refusal *refusal)
{
	struct ethtool_drvinfo driver = { .cmd = ETHTOOL_GDRVINFO };
	struct ifreq request = qs_request(bridge);

	if (ioctl(control, SIOCGIFINDEX, &request) || ioctl(control, SIOCGIFNAME, &request))
		return qs_refuse(refusal, "there is no bridge %s: %s", bridge, strerror(errno));
	if (strncmp(request.ifr_name, bridge, IFNAMSIZ))
		return qs_refuse(refusal, "%s is another name of %.*s, and only that one counts",
				 bridge, IFNAMSIZ, request.ifr_name);
	request.ifr_data = (void *)&driver;
	if (ioctl(control, SIOCETHTOOL, &request) || strcmp(driver.driver, "bridge"))
		return qs_refuse(refusal, "%s is not a bridge of the kernel's", bridge);
	return 0;
}

/* The tap */

static void qs_hint_capability(struct qs_refusal *refusal, bool had_no_new_privs)
{
	char path[256];
	ssize_t length = readlink("/proc/self/exe", path, sizeof(path));

	if (had_no_new_privs)
		qs_hint(refusal, "it was started with no_new_privs, which voids file capabilities: "
				 "by QEMU's -sandbox on, or systemd's NoNewPrivileges=");
	else if (length > 0 && (size_t)length < sizeof(path))
		qs_hint(refusal, "as root, once: setcap cap_net_admin+ep %.*s", (int)length, path);
}

/* The fd of a new tap "tap%d", and its name. */
static int qs_new_tap(bool vnet_header, char name[IFNAMSIZ], struct qs_refusal *refusal)
{
	struct ifreq request = qs_request("tap%d");
	qs_auto_close int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC);

	if (fd < 0) {
		qs_refuse(refusal, "cannot open /dev/net/tun: %s", strerror(errno));
		if (errno == EACCES)
			qs_hint(refusal, "who starts virtual machines needs to read and write it: "
					 "udev makes it 0666");
		else if (errno == ENOENT || errno == ENODEV || errno == ENXIO)
			qs_hint(refusal, "as root: modprobe tun");
		return -1;
	}
	request.ifr_flags = IFF_TAP | IFF_NO_PI | (vnet_header ? IFF_VNET_HDR : 0);
	if (ioctl(fd, TUNSETIFF, &request))
		return qs_refuse(refusal, "cannot make a tap: %s", strerror(errno));
	memcpy(name, request.ifr_name, IFNAMSIZ);
	name[IFNAMSIZ - 1] = '\0';
	return qs_take(&fd);
}

/* A bridge whose MTU nobody set takes the smallest one of its ports': the tap's is to be right before it joins. */
static int qs_set_mtu(int control, const char *tap, const char *bridge, struct qs_refusal *refusal)
{
	struct ifreq of_bridge = qs_request(bridge), of_tap = qs_request(tap);

	if (ioctl(control, SIOCGIFMTU, &of_bridge))
		return qs_refuse(refusal, "cannot read the MTU of %s: %s", bridge, strerror(errno));
	of_tap.ifr_mtu = of_bridge.ifr_mtu;
	if (ioctl(control, SIOCSIFMTU, &of_tap))
		return qs_refuse(refusal, "cannot give %s the MTU %d of %s: %s", tap,
				 of_bridge.ifr_mtu, bridge, strerror(errno));
	return 0;
}

/* A bridge takes the lowest address of its ports' as its own: one that begins with 0xFE is not it. */
static int qs_set_address(int control, const char *tap, struct qs_refusal *refusal)
{
	struct ifreq request = qs_request(tap);

	if (ioctl(control, SIOCGIFHWADDR, &request))
		return qs_refuse(refusal, "cannot read the address of %s: %s", tap,
				 strerror(errno));
	request.ifr_hwaddr.sa_data[0] = (char)0xFE;
	if (ioctl(control, SIOCSIFHWADDR, &request))
		return qs_refuse(refusal, "cannot set the address of %s: %s", tap, strerror(errno));
	return 0;
}

static int qs_join(int control, const char *tap, const char *bridge, struct qs_refusal *refusal)
{
	struct ifreq of_tap = qs_request(tap), of_bridge = qs_request(bridge);

	if (ioctl(control, SIOCGIFINDEX, &of_tap))
		return qs_refuse(refusal, "cannot find %s: %s", tap, strerror(errno));
	of_bridge.ifr_ifindex = of_tap.ifr_ifindex;
	if (ioctl(control, SIOCBRADDIF, &of_bridge))
		return qs_refuse(refusal, "cannot add %s to bridge %s: %s", tap, bridge,
				 strerror(errno));
	return 0;
}

static int qs_up(int control, const char *tap, struct qs_refusal *refusal)
{
	struct ifreq request = qs_request(tap);

	if (ioctl(control, SIOCGIFFLAGS, &request))
		return qs_refuse(refusal, "cannot read the flags of %s: %s", tap, strerror(errno));
	request.ifr_flags |= IFF_UP;
	if (ioctl(control, SIOCSIFFLAGS, &request))
		return qs_refuse(refusal, "cannot set %s up: %s", tap, strerror(errno));
	return 0;
}

/* The fd of a tap that is on the bridge and up. */
static int qs_tap_on(int control, const struct qs_bridge_args *args, struct qs_refusal *refusal)
{
	char name[IFNAMSIZ];
	qs_auto_close int tap = qs_new_tap(args->vnet_header, name, refusal);

	if (tap < 0 || qs_set_mtu(control, name, args->bridge, refusal) ||
	    qs_set_address(control, name, refusal) ||
	    qs_join(control, name, args->bridge, refusal) || qs_up(control, name, refusal))
		return -1;
	return qs_take(&tap);
}

static int qs_send(int socket, int fd, struct qs_refusal *refusal)
{
	if (qs_send_fd(socket, fd, MSG_DONTWAIT) != 1)
		return qs_refuse(refusal, "cannot send the tap over fd %d: %s", socket,
				 strerror(errno));
	return 0;
}

static int qs_serve(const struct qs_bridge_args *args, bool had_no_new_privs,
		    struct qs_refusal *refusal)
{
	qs_auto_close int control = -1, tap = -1;
	int permitted;

	if (qs_check_socket(args->fd, refusal))
		return -1;
	qs_close_others(args->fd);
	if (qs_bridge_acl_check(QS_ACL, args->bridge, refusal))
		return -1;
	control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (control < 0)
		return qs_refuse(refusal, "cannot open a socket: %s", strerror(errno));
	if (qs_check_bridge(control, args->bridge, refusal))
		return -1;

	permitted = qs_capabilities(1U << CAP_NET_ADMIN, true);
	if (permitted <= 0) {
		qs_refuse(refusal, "a tap on a bridge takes CAP_NET_ADMIN, which is missing");
		qs_hint_capability(refusal, had_no_new_privs);
		return -1;
	}
	tap = qs_tap_on(control, args, refusal);
	if (qs_capabilities(0, false) < 0)
		return qs_refuse(refusal, "cannot drop CAP_NET_ADMIN");
	return tap < 0 ? -1 : qs_send(args->fd, tap, refusal);
}

static int qs_say(const char *text)
{
	return write(STDOUT_FILENO, text, strlen(text)) < 0;
}

int main(int argc, char **argv)
{
	struct qs_refusal refusal;
	struct qs_bridge_args args;
	bool had_no_new_privs = prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1;

	if (qs_open_streams())
		_exit(EXIT_FAILURE);
	clearenv();
	qs_reset_signals();
	if (qs_drop_privileges(&refusal) || qs_bridge_args_parse(argc, argv, &args, &refusal))
		goto refused;
	switch (args.task) {
	case QS_SAY_HELP:
		return qs_say(help);
	case QS_SAY_VERSION:
		return qs_say(version);
	case QS_MAKE_TAP:
		if (qs_serve(&args, had_no_new_privs, &refusal))
			goto refused;
		return EXIT_SUCCESS;
	}
refused:
	qs_refusal_print(STDERR_FILENO, "qsteer-bridge-helper", &refusal);
	return EXIT_FAILURE;
}
