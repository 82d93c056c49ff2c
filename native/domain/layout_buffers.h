/* layout_buffers.h - the part of the layout of a domain's file (layout.h) that says what the bytes of buffers mean. */
#ifndef DMABUF_LAYOUT_BUFFERS_H
#define DMABUF_LAYOUT_BUFFERS_H
#include "domain/layout.h"

/* ---- Layouts ----
 *
 * What the bytes of a buffer mean, as the library packs it (src/dmabuf/layout/packing.py). A record gets its layout once. A slot is in use
 * if its owner is a live record that names it.
 */
#define LAYOUTS_PER  120u /* layouts in a chunk */
#define LAYOUT_BYTES 256u /* of the longest layout */

typedef struct {
  a32 owner;                   /* record + 1, 0: free */
  a32 next;                    /* next free layout + 1; 0: the last */
  uint32_t length;             /* bytes of the layout */
  uint32_t part;               /* which of a picture's buffers the record's is */
  uint8_t bytes[LAYOUT_BYTES]; /* the layout, then NULs */
} db_layout;

DB_SIZE(db_layout, 272);
DB_AT(db_layout, owner, 0);
DB_AT(db_layout, next, 4);
DB_AT(db_layout, length, 8);
DB_AT(db_layout, part, 12);
DB_AT(db_layout, bytes, 16);
#endif
