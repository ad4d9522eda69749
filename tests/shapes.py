"""Bodies of events in all shapes that VOD's documents and samples show, and in undocumented shapes.

Each function makes one body from a number. `json.dumps` writes the regular ones; bodies that `json.dumps` would never
write are written by hand. Every body contains its number, so that no two are the same event.
"""

import json

MEMBERS = (
    "FileUploadEvent",
    "ProcedureStateChangeEvent",
    "FileDeleteEvent",
    "PullCompleteEvent",
    "EditMediaComplete",
    "WechatPublishComplete",
    "TranscodeCompleteEvent",
    "ConcatCompleteEvent",
    "ClipCompleteEvent",
    "CreateImageSpriteCompleteEvent",
    "SnapshotByTimeOffsetCompleteEvent",
)

# Types and their members: neither can be derived from the other. From the event overview and its samples.
KINDS = (
    ("CreateSnapshotByTimeOffsetComplete", "SnapshotByTimeOffsetCompleteEvent"),
    ("NewFileUpload", "FileUploadEvent"),
    ("FileDeleted", "FileDeleteEvent"),
    ("ProcedureStateChanged", "ProcedureStateChangeEvent"),
    ("PullComplete", "PullCompleteEvent"),
    ("EditMediaComplete", "EditMediaCompleteEvent"),
    ("EditMediaComplete", "EditMediaComplete"),
    ("ComposeMediaComplete", "ComposeMediaCompleteEvent"),
    ("WechatPublishComplete", "WechatPublishComplete"),
    ("WechatPublishComplete", "WechatPublishCompleteEvent"),
    ("WechatMiniProgramPublishComplete", "WechatMiniProgramPublishEvent"),
    ("WechatMiniProgramPublishComplete", "WechatMiniProgramPublishCompleteEvent"),
    ("TranscodeComplete", "TranscodeCompleteEvent"),
    ("ConcatComplete", "ConcatCompleteEvent"),
    ("ClipComplete", "ClipCompleteEvent"),
    ("CreateImageSpriteComplete", "CreateImageSpriteCompleteEvent"),
    ("SplitMediaComplete", "SplitMediaCompleteEvent"),
    ("RemoveWatermark", "RemoveWatermarkCompleteEvent"),
    ("RestoreMediaComplete", "RestoreMediaCompleteEvent"),
    ("ExtractTraceWatermarkComplete", "ExtractTraceWatermarkCompleteEvent"),
    ("ExtractCopyRightWatermarkComplete", "ExtractCopyRightWatermarkCompleteEvent"),
    ("ReviewAudioVideoComplete", "ReviewAudioVideoCompleteEvent"),
    ("DescribeFileAttributesComplete", "DescribeFileAttributesCompleteEvent"),
    ("FileAttributesUpdated", "DescribeFileAttributesCompleteEvent"),
    ("QualityInspectComplete", "QualityInspectCompleteEvent"),
    ("QualityEnhanceComplete", "QualityEnhanceCompleteEvent"),
    ("ReduceMediaBitrateComplete", "ReduceMediaBitrateCompleteEvent"),
    ("MediaCastStatusChanged", "MediaCastStatusChangedEvent"),
    ("PersistenceComplete", "PersistenceCompleteEvent"),
    ("ComplexAdaptiveDynamicStreamingComplete", "ComplexAdaptiveDynamicStreamingCompleteEvent"),
    ("ProcessMediaByMPSComplete", "ProcessMediaByMPSCompleteEvent"),
    ("CreateAigcImageTaskComplete", "AigcImageCompleteEvent"),
    ("OfNextYear", "OfNextYearTask"),
)


def _task(number):
    return f"1250000000-Task-{number:032x}t0"


def _file(number):
    return str(14508071098244929440 + number)


def _dumped(content):
    return json.dumps(content, separators=(",", ":"))


def documented_snapshot(number):
    images = [{"ErrCode": 0, "TimeOffset": 10000 * at, "Url": f"http://v.example/{number}/{at}.png"} for at in (1, 2)]
    payload = {"TaskId": _task(number), "FileId": _file(number), "Definition": 10, "SnapshotInfoSet": images}
    siblings = dict.fromkeys(MEMBERS)
    return _dumped({"EventType": KINDS[0][0], **siblings, "SnapshotByTimeOffsetCompleteEvent": payload})


def snapshot_that_failed_in_part(number):
    images = [{"ErrCode": 0, "TimeOffset": 0, "Url": "u"}, {"ErrCode": 70000 + number, "TimeOffset": 1, "Url": ""}]
    payload = {"TaskId": _task(number), "FileId": _file(number), "Definition": 10, "SnapshotInfoSet": images}
    return _dumped({"EventType": KINDS[0][0], "SnapshotByTimeOffsetCompleteEvent": payload})


def each_type_without_siblings(number):
    event_type, member = KINDS[number // len(SHAPES) % len(KINDS)]
    return _dumped(
        {"EventType": event_type, member: {"TaskId": _task(number), "FileId": _file(number), "Status": "OK"}}
    )


def each_type_with_null_siblings(number):
    event_type, member = KINDS[number // len(SHAPES) % len(KINDS)]
    payload = {"TaskId": _task(number), "Status": "FINISH", "ErrCode": 0, "Message": ""}
    return _dumped({"EventType": event_type, **dict.fromkeys(MEMBERS), member: payload})


def without_type(number):
    return _dumped({"ComposeMediaCompleteEvent": {"TaskId": _task(number), "Status": "FINISH"}})


def with_a_type_that_is_null(number):
    return _dumped({"EventType": None, "FileUploadEvent": {"FileId": _file(number)}})


def with_a_type_that_is_not_a_string(number):
    return _dumped({"EventType": number, "FileUploadEvent": {"FileId": _file(number)}})


def with_a_strange_type(number):
    return _dumped({"EventType": ("", " ", "a b\nc", "[x]*?", "Ä" * 300)[number % 5], "Of": number})


def with_ids_as_numbers(number):
    beyond_doubles = f'"FileId":{2**53 + 1 + number},"TaskId":{2**63 + number}'
    beyond_64_bits = f'"Other":{2**64 + 1 + number},"Far":-{10**30 + number}'
    return f'{{"EventType":"NewFileUpload","FileUploadEvent":{{{beyond_doubles},{beyond_64_bits}}}}}'


def with_an_id_of_thousands_of_digits(number):
    return f'{{"EventType":"NewFileUpload","FileUploadEvent":{{"FileId":{10**4200 + number}}}}}'


def with_status_as_a_number(number):
    payload = {"TaskId": _task(number), "Status": number % 3, "ErrCode": "0", "Message": None}
    return _dumped({"EventType": "EditMediaComplete", "EditMediaComplete": payload})


def with_lists_null_empty_absent(number):
    images = ({"SnapshotInfoSet": None}, {"SnapshotInfoSet": []}, {}, {"SnapshotInfoSet": [None, 7, {}]})[number % 4]
    payload = {"TaskId": _task(number), "FileId": _file(number), **images}
    return _dumped({"EventType": KINDS[0][0], "SnapshotByTimeOffsetCompleteEvent": payload})


def with_ids_missing(number):
    image = {"TimeOffset": number, "Url": f"http://v.example/{number}.png"}
    return _dumped({"EventType": KINDS[0][0], "SnapshotByTimeOffsetCompleteEvent": {"SnapshotInfoSet": [image]}})


def with_ids_elsewhere(number):
    payload = {"Output": {"FileId": _file(number), "Deeper": [{"TaskId": _task(number)}]}, "TaskId": None, "FileId": 0}
    return _dumped({"EventType": "WechatMiniProgramPublishComplete", "WechatMiniProgramPublishEvent": payload})


def with_a_payload_that_is_not_an_object(number):
    payload = ([number], number, f"text {number}", True, 0.5 + number)[number % 5]
    return _dumped({"EventType": KINDS[0][0], "SnapshotByTimeOffsetCompleteEvent": payload, "N": number})


def with_the_same_key_twice(number):
    payload = f'"TaskId":"first","TaskId":"{_task(number)}","ErrCode":1,"ErrCode":0'
    twice = f'"ClipCompleteEvent":null,"ClipCompleteEvent":{{{payload}}}'
    return f'{{"EventType":"Old","EventType":"ClipComplete",{twice}}}'


def with_dates_of_zero(number):
    payload = {"FileId": _file(number), "CreateTime": "0000-00-00T00:00:00Z", "ExpireTime": "9999-12-31T23:59:59Z"}
    return _dumped({"EventType": "NewFileUpload", "FileUploadEvent": {"MediaBasicInfo": payload}})


def with_unescaped_unicode(number):
    name = "截图 🎬 é \u2013 \u2028\u2029 \u0085\ufeff\ufffe\x7f"
    return json.dumps({"EventType": "NewFileUpload", "N": number, name: name}, ensure_ascii=False)


def with_every_escape(number):
    text = r"http:\/\/v.example\/\u0031.png \b\f\n\r\t\"\\ \u0000 \u001f \u00e9 \ud83c\udfac \u2028"
    return f'{{"EventType":"PullComplete","PullCompleteEvent":{{"N":{number},"Url":"{text}"}}}}'


def with_raw_control_characters(number):
    return f'{{"EventType":"PullComplete","PullCompleteEvent":{{"N":{number},"Name":"a\tb\rc\x01\x1f\x00"}}}}'


def with_lone_surrogates(number):
    text = r"\ud83c alone, \udfac too, \ud83c\ud83c"
    return rf'{{"EventType":"ConcatComplete","\udfff":{{"N":{number},"Name":"{text}"}}}}'


def with_lone_surrogates_and_large_numbers(number):
    return rf'{{"EventType":"\ud800","N":{number},"FileId":{2**70 + number}}}'


def nested_deeply(number):
    pairs = (5, 50, 125, 130, 200)[number % 5]
    nested = '{"a":[' * pairs + "]}" * pairs
    return f'{{"EventType":"FileDeleted","N":{number},"FileDeleteEvent":{nested}}}'


def with_floats(number):
    floats = f"[60.1,-0.0,0.1e-7,1E5,1e308,5e-324,0.30000000000000004,{number}.0,{number}.25,123456789012345678901.5]"
    return f'{{"EventType":"TranscodeComplete","TranscodeCompleteEvent":{{"Durations":{floats}}}}}'


def with_blanks_everywhere(number):
    return (
        f'{{ \t"EventType" :\r "SplitMediaComplete" , "SplitMediaCompleteEvent" : {{ "N" : {number} , "A" : [ ] }} }} '
    )


def with_the_type_last(number):
    return _dumped({"FileUploadEvent": {"FileId": _file(number), "Z": 1, "A": 2}, "EventType": "NewFileUpload"})


def with_empty_names(number):
    return _dumped({"": {"": number, " ": None}, "EventType": ""})


def that_looks_like_an_answer(number):
    inner = {"Response": {"EventSet": [{"EventHandle": "inner", "EventType": "x"}], "Error": {"Code": "InternalError"}}}
    text = _dumped(inner)
    return _dumped({"EventType": "ProcedureStateChanged", "N": number, "SessionContext": text, **inner})


def large(number):
    size = 300_000 if number % 10 == 0 else 20_000
    images = [{"Url": "http://v.example/" + "x" * 180, "TimeOffset": at} for at in range(size // 200)]
    payload = {"TaskId": _task(number), "SnapshotInfoSet": images}
    return _dumped({"EventType": KINDS[0][0], "SnapshotByTimeOffsetCompleteEvent": payload})


SHAPES = (
    documented_snapshot,
    snapshot_that_failed_in_part,
    each_type_without_siblings,
    each_type_with_null_siblings,
    without_type,
    with_a_type_that_is_null,
    with_a_type_that_is_not_a_string,
    with_a_strange_type,
    with_ids_as_numbers,
    with_an_id_of_thousands_of_digits,
    with_status_as_a_number,
    with_lists_null_empty_absent,
    with_ids_missing,
    with_ids_elsewhere,
    with_a_payload_that_is_not_an_object,
    with_the_same_key_twice,
    with_dates_of_zero,
    with_unescaped_unicode,
    with_every_escape,
    with_raw_control_characters,
    with_lone_surrogates,
    with_lone_surrogates_and_large_numbers,
    nested_deeply,
    with_floats,
    with_blanks_everywhere,
    with_the_type_last,
    with_empty_names,
    that_looks_like_an_answer,
    large,
)


def bodies(count):
    """`count` bodies of distinct events, as UTF-8; the shapes alternate."""
    made = [SHAPES[number % len(SHAPES)](number) for number in range(count)]
    return [body.encode() for body in made]


# Bodies that cannot be read as an event, although their element of `EventSet` has a handle.
BROKEN = (
    b'{"EventType":"ClipComplete","ClipCompleteEvent":{"TaskId":oops}}',
    b'{"EventType":"ClipComplete","ClipCompleteEvent":{"TaskId":"a"}',
    b'{"EventType":"ClipComplete","ClipCompleteEvent":{"TaskId":"\xff\xfe"}}',
    b'{"EventType":"ClipComplete","Duration":NaN}',
    b'{"EventType":"ClipComplete","Duration":1e999}',
    b'{"EventType":"ClipComplete","N":' + b"9" * 5000 + b"}",
    b'{"EventType":"ClipComplete","N":' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    b'{"EventType":"ClipComplete","Name":"\\x"}',
)

# Elements of `EventSet` without a handle.
NO_EVENTS = (b"null", b"42", b'"text"', b"[]", b"[1,{}]")
