/* SPDX-License-Identifier: BSD-2-Clause */
/* JSON of somebody else's: one object, read strictly, of bounded size and depth. */
#ifndef QS_JSON_H
#define QS_JSON_H

#include <json-c/json.h>
#include <stddef.h>

#define QS_JSON_MAX 65536
#define QS_JSON_DEPTH 16

/* The object that a text is, blanks around it aside; NULL if it is none.  The caller puts it. */
struct json_object *qs_json_object(const char *text, size_t length);

/* The string that a member is; NULL if it is not there, or no string. */
const char *qs_json_string(const struct json_object *object, const char *key);

/* Whether a member is there and true. */
int qs_json_true(const struct json_object *object, const char *key);

static inline void qs_json_put(struct json_object **object)
{
	json_object_put(*object);
}

#define qs_auto_json __attribute__((cleanup(qs_json_put)))

#endif
