"""The chat page is one text without anything from elsewhere, and its policy lets nothing run that is not in it."""

import base64
import hashlib
import http.client
import re

from osler.serve.page import chat_page


def test_the_policy_names_style_and_script_by_their_hashes():
    page, headers = chat_page()
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)  # one, and nothing in it ends it early
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[directive] == f"'sha256-{digest}'"
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'" and policy["frame-ancestors"] == "'none'"


def test_the_page_fetches_nothing_and_writes_text_only():
    page, _ = chat_page()
    assert not re.search(r"https?:|//cdn|@import|url\(", page)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", page)
    assert not re.search(r"<[^>]*\s(?:style|on\w+)=", page), "the policy would refuse it"


def test_the_server_sends_it_without_a_key(serve):
    running = serve(key="secret")
    connection = http.client.HTTPConnection(running.host, running.port, timeout=20)
    connection.request("GET", "/")
    answer = connection.getresponse()
    page, headers = chat_page()
    assert (answer.status, answer.read().decode(), answer.getheader("Content-Type")) == (200, page, "text/html; charset=utf-8")
    assert headers == {name: answer.getheader(name) for name in headers}
