"""A stub of Tencent Cloud's APIs: any service, any action, signatures verified with the official SDK's own function."""

import hashlib
import json
import re
import time
from datetime import UTC, datetime

from tencentcloud.common.sign import Sign

from tests.receiver import Answer, Receiver

SECRET_ID = "AKIDofthestub"
SECRET_KEY = "the-secret-key-of-the-stub"
_AUTHORIZATION = re.compile(
    r"TC3-HMAC-SHA256 Credential=([^/]+)/([^/]+)/([^/]+)/tc3_request, SignedHeaders=content-type;host, Signature=(\w+)"
)


class TencentApi(Receiver):
    """Accepts calls that are signed with its key for its service; tests set the answers.

    Attributes:
        service: The service in the signature's scope.
        key: SecretId, SecretKey and token (None for a permanent key).
        refuse_with: The error code of its answer; None: it accepts the call.
        breaks: Number of next calls whose connection is closed without an answer.
        answer: If not None, the answer to all other calls, whatever their signature.
    """

    def __init__(self, service="eb"):
        super().__init__()
        self.service = service
        self.key = (SECRET_ID, SECRET_KEY, None)
        self.refuse_with = None
        self.breaks = 0
        self.answer = None
        self.calls = []

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server_port}"

    def answer_to(self, received):
        if self.breaks:
            self.breaks -= 1
            self.released.set()
            return Answer(hangs=True)
        if self.answer is not None:
            return self.answer
        code = self._refusal_of(received) or self.refuse_with
        response = {"RequestId": f"request-{len(self.received)}"}
        if code is None:
            self.calls.append(received)
        else:
            response["Error"] = {"Code": code, "Message": "the stub says so"}
        return Answer(200, body=json.dumps({"Response": response}).encode())

    def _refusal_of(self, received):
        headers = {name.lower(): value for name, value in received.headers.items()}
        secret_id, secret_key, token = self.key
        claim = _AUTHORIZATION.fullmatch(headers.get("authorization", ""))
        if claim is None:
            return "AuthFailure.InvalidAuthorization"
        if claim[1] != secret_id:
            return "AuthFailure.SecretIdNotFound"
        timestamp = headers["x-tc-timestamp"]
        if abs(int(timestamp) - time.time()) > 300:
            return "AuthFailure.SignatureExpire"
        date = datetime.fromtimestamp(int(timestamp), UTC).strftime("%Y-%m-%d")
        signed = f"content-type:{headers['content-type']}\nhost:{headers['host']}\n"
        digest = hashlib.sha256(received.body).hexdigest()
        canonical = f"{received.method}\n{received.path}\n\n{signed}\ncontent-type;host\n{digest}"
        scope = f"{date}/{self.service}/tc3_request"
        text = f"TC3-HMAC-SHA256\n{timestamp}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
        if f"{claim[2]}/{claim[3]}/tc3_request" != scope:
            return "AuthFailure.SignatureFailure"
        if claim[4] != Sign.sign_tc3(secret_key, date, self.service, text):
            return "AuthFailure.SignatureFailure"
        return None if headers.get("x-tc-token") == token else "AuthFailure.TokenFailure"
