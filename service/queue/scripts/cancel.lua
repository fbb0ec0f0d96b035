#!lua flags=allow-oom
-- End a queued job, mark a running one. ARGV: "canceled" or "expired", code, detail. Returns the state it found, or "gone".
local state = redis.call('HGET', KEYS[1], 'st')
if state == 'queued' then
  finish(ARGV[1], ARGV[2], ARGV[3])
elseif state == 'running' then
  redis.call('HSET', KEYS[1], 'cx', 1)
end
return state or 'gone'
