/* words.h - the words of a domain by their offset. */
#ifndef DMABUF_WORDS_H
#define DMABUF_WORDS_H
#include "domain/shm.h"

extern PyMethodDef word_methods[];
#endif
