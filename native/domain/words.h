/* words.h - methods of Shm on the words of a domain. */
#ifndef DMABUF_WORDS_H
#define DMABUF_WORDS_H
#include "python.h"

extern PyMethodDef word_methods[];
#endif
