import contextlib
import sqlite3
import time

def turn(call_sid, delivery, words):  # new
    insert = ("INSERT OR IGNORE INTO turns (call_sid, words, delivery, turn)"  # new
              " SELECT ?1, ?2, ?3, count(*) + 1 FROM turns WHERE call_sid = ?1"  # new
              " RETURNING turn, id")  # new
    for turn, row_id in sql(insert, call_sid, words, delivery):  # new
        sql("UPDATE turns SET stop = 'overtaken'"  # new
            " WHERE call_sid = ? AND id < ? AND stop IS NULL", call_sid, row_id)  # new
        sql("UPDATE turns SET reply = substr(reply, 1, last_part + 15*(?2-given_at)) ||"  # new
            " ' [The caller cut in here.]' WHERE call_sid = ?1"  # new
            " AND last_part + 15*(?2-given_at) < length(reply)", call_sid, time.time())  # new
        return turn, row_id  # new
    find = "SELECT turn FROM turns WHERE call_sid = ? AND delivery = ?"  # new
    return sql(find, call_sid, delivery)[0][0], None  # new

def turns(call_sid):
    return sql("SELECT words, reply FROM turns WHERE call_sid = ? ORDER BY turn", call_sid)

def grow(row_id, text, stop=None):  # new
    return sql("UPDATE turns SET reply = reply || ?, stop = ?"  # new
               " WHERE id = ? AND stop IS NULL RETURNING id", text, stop, row_id)  # new

def wait(call_sid, turn, heard):  # new
    for _ in range(60):  # 6 seconds, since Twilio waits only 15
        ((reply, stop),) = sql("SELECT reply, stop FROM turns"  # new
                               " WHERE call_sid = ? AND turn = ?", call_sid, turn)  # new
        if stop or len(reply) > heard:
            break
        time.sleep(0.1)
    return reply, stop

def give(call_sid, turn, last_part):  # new
    sql("UPDATE turns SET last_part = ?, given_at = ? WHERE call_sid = ? AND turn = ?",  # new
        last_part, time.time(), call_sid, turn)  # new

def end(call_sid):
    sql("DELETE FROM turns WHERE call_sid = ?", call_sid)

def sql(statement, *values):
    with contextlib.closing(sqlite3.connect("calls.db", isolation_level=None)) as database:
        database.execute("CREATE TABLE IF NOT EXISTS turns (id INTEGER PRIMARY KEY, turn,"  # new
                         " call_sid, words, stop, reply DEFAULT '',"  # new
                         " last_part, given_at, delivery, UNIQUE (call_sid, delivery))")  # new
        return database.execute(statement, values).fetchall()
