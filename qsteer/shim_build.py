# SPDX-License-Identifier: BSD-2-Clause
"""Builds ``qsteer._shim`` out of c/shim.c, c/stub.c, c/hints.c and c/vnet_hash.c (cffi, API mode).

The declarations name what Python uses; the C compiler fills in every number, size and offset (``...``), so that none is
written down twice.
"""

from cffi import FFI

ffi = FFI()

ffi.cdef("""
#define QS_ABI ...
#define QS_KEY_BYTES ...
#define QS_HOST_PID_NAMESPACE ...
#define QS_TABLE_ENTRIES ...
#define QS_BUILD_SHARED_BODY ...
#define QS_BUILD_COMPLETE ...
#define QS_SOURCE_STATIC ...
#define QS_SOURCE_SHARED_MAPS ...
#define QS_SOURCE_DEVICE_STATE ...
#define QS_SOURCE_GUEST_AGENT ...
#define QS_SOURCE_QEMU_MAPS ...
#define QS_PROGRAM_MAPS ...
#define BPF_MAP_TYPE_PROG_ARRAY ...
#define IFF_TAP ...
#define IFF_MULTI_QUEUE ...
#define IFF_PERSIST ...
#define IFF_VNET_HDR ...
#define QS_TUN_VNET_LE ...
#define QS_TUN_VNET_BE ...
#define CAP_NET_ADMIN ...
#define CAP_PERFMON ...
#define CAP_BPF ...
#define CAP_SYS_ADMIN ...
#define SO_PEERGROUPS ...

struct qs_rss_config {
    uint8_t redirect;
    uint32_t hash_types;
    uint16_t indirections_len;
    uint16_t default_queue;
    ...;
};
struct qs_ident {
    uint64_t magic;
    uint32_t abi;
    uint32_t build;
    uint32_t source;
    uint32_t displaced;
    uint8_t version[4];
    char tap[16];
    ...;
};
struct qs_queue {
    uint64_t file;
    uint32_t pid;
    uint32_t fd;
    uint32_t netns;
    uint32_t ifindex;
    uint32_t flags;
    uint32_t prog_id;
    uint32_t active;
    uint32_t disabled;
    uint64_t attachment;
    uint64_t vnet_hash;
    uint16_t queue_index;
    uint16_t detached;
    uint32_t header;
    char comm[16];
    char tap[16];
    ...;
};
struct qs_vnet_hash {
    uint32_t netns;
    uint32_t ifindex;
    uint8_t rss;
    uint8_t report;
    uint16_t unclassified_queue;
    uint32_t types;
    uint32_t entries;
    uint8_t key[...];
    uint16_t table[...];
    ...;
};
struct qs_program { int prog_fd; int config_fd; int key_fd; int table_fd; uint32_t id; ...; };
struct qs_program_info {
    uint32_t id;
    uint32_t type;
    uint32_t config_id;
    uint32_t key_id;
    uint32_t table_id;
    uint32_t frozen_id;
    uint32_t bodies_id;
    uint64_t loaded_ns;
    uint32_t uid;
    uint32_t has_ident;
    uint32_t verified_insns;
    uint8_t tag[8];
    char name[16];
    struct qs_ident ident;
    ...;
};

static const uint64_t qs_magic;

int qs_tap_open(char name[16], int exclusive, int *fd);
int qs_tap_name(int fd, char name[16]);
int qs_tap_flags(int fd, uint32_t *flags);
int qs_steering_attach(int fd, int prog_fd);
int qs_steering_detach(int fd);
int qs_pidfd_getfd(int pidfd, int target, int *fd);
int qs_netns_enter(int netns_fd);
int qs_fds_send(int sock, const int *fds, size_t count);
int qs_fds_receive(int sock, int *fds, size_t count);
int qs_capabilities_drop(void);
int qs_capabilities_limit(uint64_t keep);
int qs_capabilities_effective(uint64_t *set);
int qs_lock_writer(int fd, int *pid);
int qs_bpffs_mount(const char *path);
int qs_program_load(const char *object, const struct qs_ident *ident, const int *map_fds, struct qs_program *program);
int qs_stub_load_frozen(const struct qs_ident *ident, const struct qs_rss_config *config, const uint8_t *key,
                        const uint16_t *table, int bodies_fd, struct qs_program *program);
int qs_stub_load_maps(const struct qs_ident *ident, const int *map_fds, int bodies_fd, struct qs_program *program);
int qs_bodies_refill(int bodies_fd, const char *object);
int qs_bodies_create(const char *object, int *bodies_fd);
int qs_pin(int fd, const char *path);
int qs_pinned(const char *path, int *fd);
int qs_bodies_program(int bodies_fd, uint32_t *id);
const char *qs_log_take(void);
int qs_program_fd(uint32_t id, int *fd);
int qs_program_info(int prog_fd, struct qs_program_info *info);
int qs_map_fd(uint32_t id, int *fd);
int qs_program_next_id(uint32_t after, uint32_t *id);
int qs_program_maps(int prog_fd, uint32_t *ids, uint32_t *count);
int qs_map_info(int fd, uint32_t *id, uint32_t *type, char name[16]);
int qs_config_read(int config_fd, int key_fd, int table_fd, struct qs_rss_config *config, uint8_t *key,
                   uint16_t *table);
int qs_frozen_read(int fd, struct qs_rss_config *config, uint8_t *key, uint16_t *table);
int qs_config_write(int config_fd, int key_fd, int table_fd, const struct qs_rss_config *config, const uint8_t *key,
                    const uint16_t *table);
int qs_program_run(int prog_fd, const void *packet, uint32_t len, uint32_t repeat, uint32_t *answer,
                   uint32_t *cb_left, uint32_t *duration_ns);
struct qs_tun_iter;
int qs_tun_iter_open(const char *object, int tun_fd, struct qs_tun_iter **iter);
void qs_tun_iter_close(struct qs_tun_iter *iter);
int qs_tun_iter_read(struct qs_tun_iter *iter, int pid, void **records, size_t *size);
void qs_free(void *memory);
int qs_tun_digest_devices(struct qs_tun_iter *iter, uint64_t *digest);
int qs_tun_digest_holders(struct qs_tun_iter *iter, uint64_t *digest);

struct qs_bpf_event { uint32_t unload; uint32_t id; ...; };
struct qs_bpf_events;
int qs_bpf_events_open(struct qs_bpf_events **events, int *fd);
int qs_bpf_events_read(struct qs_bpf_events *events, struct qs_bpf_event *into, size_t room, size_t *count, int *lost);
void qs_bpf_events_close(struct qs_bpf_events *events);
int qs_uevents_open(int netns_fd, int *fd);
int qs_uevents_read(int fd, int *hint);

struct qs_vnet_can { uint32_t abi; uint32_t types; uint8_t rss; uint8_t report; ...; };
struct qs_vnet_probe {
    struct qs_vnet_can can;
    uint8_t steers;
    uint8_t reports;
    uint8_t exclusive;
    uint8_t strict;
    ...;
};
#define QS_VNET_ABI_3 ...
#define QS_VNET_ABI_12 ...
int qs_vnet_can(int fd, struct qs_vnet_can *can);
int qs_vnet_rss(int fd, uint32_t abi, const struct qs_rss_config *config, const uint8_t *key, const uint16_t *table,
                int report);
int qs_vnet_automq(int fd, uint32_t abi, uint32_t types);
struct qs_vnet_probing { int pid; ...; };
int qs_vnet_probe_start(struct qs_vnet_probing *probing, struct qs_vnet_probe *found);
void qs_vnet_probe_end(struct qs_vnet_probing *probing);
static const uint8_t qs_vnet_probe_key[...];
#define QS_VNET_PROBE_ENTRIES ...
static const uint16_t qs_vnet_probe_table[...];
""")

ffi.set_source(
    "qsteer._shim",
    """
    #include <linux/bpf.h>
    #include <linux/capability.h>
    #include <linux/if.h>
    #include <linux/if_tun.h>
    #include <sys/socket.h>
    #include "hints.h"
    #include "shim.h"
    #include "stub.h"
    #include "vnet_hash.h"
    static const uint64_t qs_magic = QS_MAGIC;
    """,
    sources=["c/hints.c", "c/shim.c", "c/stub.c", "c/vnet_hash.c"],
    include_dirs=["c"],
    depends=[
        *("c/auto.h", "c/hints.h", "c/shim.h", "c/stub.h", "c/vnet_hash.h"),
        *("c/bpf/abi.h", "c/bpf/handover.h", "c/bpf/toeplitz.h"),
    ],
    libraries=["bpf"],
    extra_compile_args=["-O2", "-Wall", "-Werror"],
    py_limited_api=True,
)

if __name__ == "__main__":
    ffi.compile(verbose=True)
