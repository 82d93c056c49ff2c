/* The two readers of stream.pml. */

/* The frame is the reader's; its content is only once the frame's fence is signaled. */
#if FENCES
#define WAIT_JOB(me, bug) if :: job[k] != PENDING || BUG == bug :: else -> job[k] != PENDING fi
#else
#define WAIT_JOB(me, bug) skip
#endif

proctype Queue() {
  byte h, k, w, me = QR;
  { skip;
#if HISTORY
    atomic { h = head; from = (h > HISTORY -> h - HISTORY + 1 : 1); h = 0 };
    cursor = from;
    h = from;
#if BUG == 34 /* up to the frame that was the newest one before the cursor was stored */
    byte newest = h + HISTORY - 1;
    do
    :: h > newest || h > head -> break
    :: h <= newest && h <= head ->
#else
    do
    :: head < h -> break                                                     /* each frame from the cursor on was there */
    :: head >= h ->
#endif
       k = order[h % M];
       if
       :: (seq[k] != h || writing[k]) && BUG != 31 -> goto lost
       :: else
       fi;
       if
       :: (foreign[k] & WRITES) && BUG != 33 -> goto lost
       :: else
       fi;
       if
       :: torn[k] -> goto lost
       :: else -> goto there
       fi;
lost:  atomic { cursor = h + 1; from = cursor };
       wake(SPACE | ASK);
there:
       atomic { h++; k = 0 };
#if BUG == 32 /* the oldest frame that is there, and no look at the others */
       if :: cursor < h -> break :: else fi
#endif
    od;
    h = 0;
#else
join:
    atomic { h = head; k = head_slot };
    if
    :: h -> clear_foreign(k, WRITES)
    :: else
    fi;
    atomic { cursor = (h -> h : 1); from = cursor };
    if
    :: head == h || BUG == 8
    :: else -> goto join
    fi;
    if
    :: h ->
       if
       :: (foreign[k] & WRITES) && BUG != 9 -> goto next_frame                /* a foreign writer may have it */
       :: else ->
          if
          :: torn[k] && BUG != 23 ->
next_frame:  atomic { cursor = h + 1; from = cursor };
             wake(ASK)
          :: else
          fi
       fi
    :: else
    fi;
    atomic { h = 0; k = 0 };
#endif
look:
#if KEEP
    if
    :: inuse[KEPT] -> atomic { kept[inuse[KEPT] - 1] = 0; inuse[KEPT] = 0 }; wake(SPACE | ASK)
    :: true
    fi;
#endif
    LISTEN(NEWS);
    if
    :: atomic { head >= cursor -> k = order[cursor % M]; moved[QR] = 1 };
       WAIT_JOB(QR, 43);
       if
       :: job[k] == FAILED
       :: else -> atomic { assert(content[k] == cursor); inuse[QR] = k + 1 }
       fi;
#if KEEP
       if
       :: atomic { !inuse[KEPT] && inuse[QR] -> inuse[KEPT] = inuse[QR] };
#if BUG == 35 /* the cursor moves before the claim */
          atomic { cursor++; from++; inuse[QR] = 0 };
          atomic { kept[k] = 1; k = 0 };
#else
          kept[k] = 1;
          atomic { cursor++; from++; inuse[QR] = 0; k = 0 };
#endif
          wake(SPACE | ASK);
          goto look
       :: true
       fi;
#endif
       atomic { assert(cursor == from && (!inuse[QR] || content[k] == cursor)); from++; inuse[QR] = 0; cursor++; k = 0 };
       wake(SPACE | ASK);
       goto look
    :: else ->
       if
       :: OVER ->                                                            /* what was published before the end comes first */
          if
          :: head >= cursor && BUG != 24 -> goto look
          :: else -> moved[QR] = 1; assert(head < cursor)
          fi
       :: else -> SLEEP(head >= cursor || OVER); goto look
       fi
    fi;
#if KEEP
    if
    :: inuse[KEPT] -> atomic { kept[inuse[KEPT] - 1] = 0; inuse[KEPT] = 0 }
    :: else
    fi;
#endif
    cursor = NONE;                                                           /* leave */
    wake(SPACE | ASK);
    finished[QR] = 1
  } unless { dead[QR] }
}

proctype Latest() {
  byte h, k, last, w, me = LR;
  { skip;
look:
    LISTEN(NEWS);
    atomic { h = head; k = head_slot };
    if
    :: h > last ->
       clear_foreign(k, WRITES);
       if
       :: foreign[k] & WRITES -> goto wait
       :: else
       fi;
       claim[k] = 1;                                                         /* the claim; then the second look */
       if
       :: head != h && BUG != 10 -> goto unclaim
       :: else
       fi;
       if
       :: (foreign[k] & WRITES) && BUG != 11 -> goto unclaim
       :: else
       fi;
       if
       :: torn[k] && BUG != 25 ->
          claim[k] = 0;
          wake(SPACE | ASK);
wait:     if
          :: OVER ->
             if
             :: atomic { head == h && torn[k] -> moved[LR] = 1; goto over }    /* the last frame is torn */
             :: else
             fi
          :: else
          fi;
          atomic { h = 0; k = 0 };
          SLEEP(head && (head > last) && (UNDISTURBED || OVER));
          goto look
       :: else
       fi;
       WAIT_JOB(LR, 44);
       if
       :: job[k] == FAILED -> atomic { last = h; moved[LR] = 1 }
       :: else -> atomic { assert(content[k] == h && h > last); inuse[LR] = k + 1; last = h; moved[LR] = 1 }
       fi;
       atomic { assert(!inuse[LR] || content[k] == h); inuse[LR] = 0; claim[k] = 0; h = 0; k = 0 };
       wake(SPACE | ASK);
       goto look;
unclaim:
       atomic { claim[k] = 0; h = 0; k = 0 };
       wake(SPACE | ASK);
       goto look
    :: else ->
       atomic { h = 0; k = 0 };
       if
       :: OVER -> if :: head > last -> goto look :: else -> moved[LR] = 1 fi
       :: else -> SLEEP(head > last || OVER); goto look
       fi
    fi;
over:
    finished[LR] = 1
  } unless { dead[LR] }
}
