#pragma once
#include <locale.h>
#include <stdio.h>
extern "C" {
int sscanf_l(const char*, locale_t, const char*, ...);
int snprintf_l(char*, size_t, locale_t, const char*, ...);
int asprintf_l(char**, locale_t, const char*, ...);
}
#undef MB_CUR_MAX
