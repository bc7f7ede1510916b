// SPDX-License-Identifier: BSD-2-Clause
/*
 * libvirt (7.9 and later) describes a NIC by two objects:
 *
 *	-netdev {"type":"tap","fds":"33:34","vhost":true,"vhostfds":"35:36","id":"hostnet0"}
 *	-device {"driver":"virtio-net-pci","rss":true,"netdev":"hostnet0","id":"net0",...}
 *
 * What is in keyval form, as libvirt wrote it before and people do, is left as it is: QEMU takes no list of fds there.
 *
 * Every word after a "-device" is looked at, be the "-device" itself the value of another option or not: an object of
 * a virtio-net is nothing but a -device's value.
 */
#define _GNU_SOURCE
#include "qemu_nics.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "json.h"

static bool qs_is_virtio_net(const char *driver)
{
	size_t length = strlen("virtio-net");

	return driver && !strncmp(driver, "virtio-net", length) &&
	       (!driver[length] || driver[length] == '-' || driver[length] == ',');
}

/* From QEMU 10.1 on it may be "auto", too, and is then up to QEMU. */
static bool qs_has_rss(const struct json_object *device)
{
	const char *word = qs_json_string(device, "rss");

	return qs_json_true(device, "rss") || (word && !strcmp(word, "on"));
}

/* The value of a key in "driver,key=value,...", and its length. */
static const char *qs_keyval(const char *text, const char *key, int *length)
{
	size_t key_length = strlen(key);

	while ((text = strchr(text, ','))) {
		text++;
		if (strncmp(text, key, key_length) || text[key_length] != '=')
			continue;
		text += key_length + 1;
		*length = (int)strcspn(text, ",");
		return text;
	}
	return NULL;
}

static bool qs_keyval_has_rss(const char *text)
{
	static const char *const on[] = { "on", "yes", "true", "y" };
	int length;
	const char *value = qs_keyval(text, "rss", &length);

	for (size_t i = 0; value && i < sizeof(on) / sizeof(*on); i++)
		if (strlen(on[i]) == (size_t)length && !strncmp(value, on[i], length))
			return true;
	return false;
}

static void qs_name_nic(struct qs_nic *nic, const char *id, int length)
{
	int most = sizeof(nic->name) - 1;

	snprintf(nic->name, sizeof(nic->name), "%.*s", length < most ? length : most, id);
}

/* Whether a -device is of a NIC that is offered RSS. */
static bool qs_read_keyval(const char *text, struct qs_nic *nic)
{
	int length;
	const char *id;

	if (!qs_is_virtio_net(text) || !qs_keyval_has_rss(text))
		return false;
	id = qs_keyval(text, "id", &length);
	if (!id)
		id = qs_keyval(text, "netdev", &length);
	if (id)
		qs_name_nic(nic, id, length);
	nic->why_not = "its -device is not JSON, and so can hold no fds";
	return true;
}

static bool qs_read_device(const char *text, struct qs_nic *nic)
{
	struct json_object *have;
	const char *id;

	*nic = (struct qs_nic){ .name = "a virtio-net", .queue_fd = -1 };
	if (*text != '{')
		return qs_read_keyval(text, nic);
	nic->device = qs_json_object(text, strlen(text));
	if (!nic->device) {
		nic->why_not = "its -device cannot be read";
		return strstr(text, "virtio-net") && strstr(text, "rss");
	}
	if (!qs_is_virtio_net(qs_json_string(nic->device, "driver")) || !qs_has_rss(nic->device)) {
		qs_json_put(&nic->device);
		return false;
	}
	id = qs_json_string(nic->device, "id");
	if (!id)
		id = qs_json_string(nic->device, "netdev");
	if (id)
		qs_name_nic(nic, id, INT_MAX);
	nic->why_not = "its -netdev is not there, or not JSON";
	if (json_object_object_get_ex(nic->device, "ebpf-rss-fds", &have))
		nic->why_not = "its -device has ebpf-rss-fds already";
	return true;
}

/* The first of "33:34"; -1 if that is anything but numbers. */
static int qs_first_fd(const char *fds)
{
	long long number = 0;

	if (!fds || *fds < '0' || *fds > '9' || fds[strspn(fds, "0123456789:")])
		return -1;
	for (; *fds && *fds != ':' && number <= INT_MAX; fds++)
		number = number * 10 + (*fds - '0');
	return number <= INT_MAX ? (int)number : -1;
}

/* As QEMU decides: fds of vhost, or force, mean it where nothing else is said. */
static bool qs_has_vhost(const struct json_object *netdev)
{
	struct json_object *said;

	if (json_object_object_get_ex(netdev, "vhost", &said))
		return qs_json_true(netdev, "vhost");
	return qs_json_string(netdev, "vhostfd") || qs_json_string(netdev, "vhostfds") ||
	       qs_json_true(netdev, "vhostforce");
}

static void qs_join(struct qs_nic *nic, const struct json_object *netdev)
{
	const char *type = qs_json_string(netdev, "type"), *fds = qs_json_string(netdev, "fds");

	nic->vhost = qs_has_vhost(netdev);
	nic->queue_fd = qs_first_fd(fds ? fds : qs_json_string(netdev, "fd"));
	if (!type || strcmp(type, "tap"))
		nic->why_not = "its -netdev is no tap";
	else if (nic->queue_fd < 0)
		nic->why_not = "its -netdev has no numbers of fds";
	else
		nic->why_not = NULL;
}

static void qs_read_netdev(const char *text, struct qs_nics *nics)
{
	qs_auto_json struct json_object *netdev =
		*text == '{' ? qs_json_object(text, strlen(text)) : NULL;
	const char *id = qs_json_string(netdev, "id");

	for (int i = 0; id && i < nics->count; i++) {
		struct qs_nic *nic = &nics->nic[i];
		const char *its = qs_json_string(nic->device, "netdev");
		struct json_object *have;

		if (its && !strcmp(its, id) &&
		    !json_object_object_get_ex(nic->device, "ebpf-rss-fds", &have))
			qs_join(nic, netdev);
	}
}

static bool qs_is_option(const char *word, const char *name)
{
	return word[0] == '-' && !strcmp(word + 1 + (word[1] == '-'), name);
}

void qs_nics_read(int argc, char *const *argv, struct qs_nics *nics)
{
	nics->count = 0;
	for (int i = 1; i + 1 < argc && nics->count < QS_NICS_MAX; i++) {
		struct qs_nic *nic = &nics->nic[nics->count];

		if (qs_is_option(argv[i], "device") && qs_read_device(argv[i + 1], nic)) {
			nic->position = i + 1;
			nics->count++;
		}
	}
	for (int i = 1; i + 1 < argc && nics->count; i++)
		if (qs_is_option(argv[i], "netdev"))
			qs_read_netdev(argv[i + 1], nics);
}

void qs_nics_free(struct qs_nics *nics)
{
	for (int i = 0; i < nics->count; i++)
		json_object_put(nics->nic[i].device);
	nics->count = 0;
}

char *qs_nic_with_fds(const char *device, const int fds[QS_PROGRAM_FDS])
{
	/* Nothing but blanks follows the object, and it has members: the driver, rss. */
	const char *brace = strrchr(device, '}');
	char *text;

	if (asprintf(&text, "%.*s,\"ebpf-rss-fds\":[\"%d\",\"%d\",\"%d\",\"%d\"]%s",
		     (int)(brace - device), device, fds[0], fds[1], fds[2], fds[3], brace) < 0)
		return NULL;
	return text;
}
