import contextlib
import sqlite3
import time

def turn(call_sid, delivery, words):  # new
    for (turn,) in sql("INSERT OR IGNORE INTO turns (call_sid, words, delivery)"  # new
                       " VALUES (?, ?, ?) RETURNING turn", call_sid, words, delivery):  # new
        sql("UPDATE turns SET stop = 'overtaken'"  # new
            " WHERE call_sid = ? AND turn < ? AND stop IS NULL", call_sid, turn)  # new
        sql("UPDATE turns SET reply = substr(reply, 1, 15*(?2-given_at)) || ' [cut off]'"  # new
            " WHERE call_sid = ?1 AND 15*(?2-given_at) < length(reply)",  # new
            call_sid, time.time())  # new
        return turn, True  # new
    find = "SELECT turn FROM turns WHERE call_sid = ? AND delivery = ?"  # new
    return sql(find, call_sid, delivery)[0][0], False  # new

def turns(call_sid):
    return sql("SELECT words, reply FROM turns WHERE call_sid = ? ORDER BY turn", call_sid)

def grow(turn, text, stop=None):
    return sql("UPDATE turns SET reply = reply || ?, stop = ?"  # new
               " WHERE turn = ? AND stop IS NULL RETURNING turn", text, stop, turn)  # new

def wait(turn, heard):
    for _ in range(60):  # 6 seconds, since Twilio waits only 15
        ((reply, stop),) = sql("SELECT reply, stop FROM turns WHERE turn = ?", turn)
        if stop or len(reply) > heard:
            break
        time.sleep(0.1)
    return reply, stop

def give(turn, heard):  # a voice says 15 characters a second  # new
    sql("UPDATE turns SET given_at = ? WHERE turn = ?", time.time() - heard / 15, turn)  # new

def end(call_sid):
    sql("DELETE FROM turns WHERE call_sid = ?", call_sid)

def sql(statement, *values):
    with contextlib.closing(sqlite3.connect("calls.db", isolation_level=None)) as database:
        database.execute("CREATE TABLE IF NOT EXISTS turns (turn INTEGER PRIMARY KEY,"
                         " call_sid, words, stop, reply DEFAULT '',"  # new
                         " given_at, delivery, UNIQUE (call_sid, delivery))")  # new
        return database.execute(statement, values).fetchall()
