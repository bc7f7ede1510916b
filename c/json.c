// SPDX-License-Identifier: BSD-2-Clause
#include "json.h"

#include <string.h>

struct json_object *qs_json_object(const char *text, size_t length)
{
	struct json_tokener *reader;
	struct json_object *object;
	size_t end;

	if (length > QS_JSON_MAX)
		return NULL;
	reader = json_tokener_new_ex(QS_JSON_DEPTH);
	if (!reader)
		return NULL;
	/* Only this flag has the library refuse what only resembles JSON. */
	json_tokener_set_flags(reader, JSON_TOKENER_STRICT | JSON_TOKENER_ALLOW_TRAILING_CHARS);
	object = json_tokener_parse_ex(reader, text, (int)length);
	end = json_tokener_get_parse_end(reader);
	json_tokener_free(reader);
	while (end < length && text[end] && strchr(" \t\r\n", text[end]))
		end++;
	if (end == length && json_object_is_type(object, json_type_object))
		return object;
	json_object_put(object);
	return NULL;
}

const char *qs_json_string(const struct json_object *object, const char *key)
{
	struct json_object *member;

	if (!json_object_object_get_ex(object, key, &member) ||
	    !json_object_is_type(member, json_type_string))
		return NULL;
	return json_object_get_string(member);
}

int qs_json_true(const struct json_object *object, const char *key)
{
	struct json_object *member;

	return json_object_object_get_ex(object, key, &member) &&
	       json_object_is_type(member, json_type_boolean) && json_object_get_boolean(member);
}
