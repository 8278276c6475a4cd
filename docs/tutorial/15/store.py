import contextlib
import sqlite3
import time

def turn(call_sid, delivery, words):
    for (turn,) in sql("INSERT OR IGNORE INTO turns (call_sid, words, delivery)"
                       " VALUES (?, ?, ?) RETURNING turn", call_sid, words, delivery):
        sql("UPDATE turns SET stop = 'overtaken'"
            " WHERE call_sid = ? AND turn < ? AND stop IS NULL", call_sid, turn)
        sql("UPDATE turns SET reply = substr(reply, 1, 15*(?2-given_at)) || ' [cut off]'"
            " WHERE call_sid = ?1 AND 15*(?2-given_at) < length(reply)",
            call_sid, time.time())
        return turn, True
    find = "SELECT turn FROM turns WHERE call_sid = ? AND delivery = ?"
    return sql(find, call_sid, delivery)[0][0], False

def turns(call_sid):
    return sql("SELECT words, reply FROM turns WHERE call_sid = ? ORDER BY turn", call_sid)

def grow(turn, text, stop=None):
    return sql("UPDATE turns SET reply = reply || ?, stop = ?"
               " WHERE turn = ? AND stop IS NULL RETURNING turn", text, stop, turn)

def wait(turn, heard):
    for _ in range(60):  # 6 seconds, since Twilio waits only 15
        ((reply, stop),) = sql("SELECT reply, stop FROM turns WHERE turn = ?", turn)
        if stop or len(reply) > heard:
            break
        time.sleep(0.1)
    return reply, stop

def give(turn, heard):  # a voice says 15 characters a second
    sql("UPDATE turns SET given_at = ? WHERE turn = ?", time.time() - heard / 15, turn)

def end(call_sid):
    sql("DELETE FROM turns WHERE call_sid = ?", call_sid)

def sql(statement, *values):
    with contextlib.closing(sqlite3.connect("calls.db", isolation_level=None)) as database:
        database.execute("CREATE TABLE IF NOT EXISTS turns (turn INTEGER PRIMARY KEY,"
                         " call_sid, words, stop, reply DEFAULT '',"
                         " given_at, delivery, UNIQUE (call_sid, delivery))")
        return database.execute(statement, values).fetchall()
