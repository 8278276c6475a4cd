"""How gunicorn serves the app. ``gunicorn app:app`` reads this file by itself.

https://gunicorn.org/reference/settings/
"""

import io
import socket
import sys

threads = 100  # a caller who waits for Claude holds one; gunicorn starts them as they are needed
worker_connections = 400  # open ones; with 1,024 files for two workers, half are left for Claude
keepalive = 95  # seconds: Heroku's router keeps a connection for 90 s, Railway's for 60 s
control_socket_disable = True  # it would be in the home folder, and nobody here uses it
BODY_SECONDS = 2  # for each part of a request's body: Twilio sends it all at once
LARGEST_BODY = 32 * 1024  # bytes, as in app.py


def post_worker_init(worker):
    """Log what runs here, and read bodies before the app does: one sent in part must not hold a
    thread for long. Slow or half-sent heads are the business of the router in front."""
    announce = getattr(sys.modules.get("app"), "announce", None)
    if announce:  # the programs of the tutorial have none
        announce()
    app = worker.wsgi

    def read_body(environ, start_response):
        connection = environ["gunicorn.socket"]
        try:
            connection.settimeout(BODY_SECONDS)
            body = environ["wsgi.input"].read(LARGEST_BODY + 1)
            connection.settimeout(None)
        except OSError:  # too slow, or malformed
            connection.shutdown(socket.SHUT_RD)  # or gunicorn itself would wait for the rest
            start_response("400 Bad Request", [("Content-Length", "0")])
            return []
        environ["wsgi.input"] = io.BytesIO(body)
        return app(environ, start_response)

    worker.wsgi = read_body
