-- Put in front of every script, below its "#!lua" line (without allow-oom a full store could not be emptied).
-- A script that can end a job has KEYS = job, queue, counters, active, results, dead letters, input pieces...
-- Only these functions and the scripts change a job's state; the stream is no more than the delivery record.

local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + t[2] / 1000
end

local function ms(x) -- tostring() would round to 14 digits
  return string.format('%.3f', x)
end

local function live(state)
  return state == 'queued' or state == 'running'
end

-- Whether the worker still holds the job: a state alone or a pending entry alone proves nothing.
local function held(fence, worker)
  local j = redis.call('HMGET', KEYS[1], 'st', 'f', 'w')
  return j[1] == 'running' and j[2] == fence and j[3] == worker, j
end

-- The one way for a job to end: frees first, counts down once, answers once.
local function finish(state, code, detail, more)
  local j = redis.call('HMGET', KEYS[1], 'id', 'mid', 'n', 'at', 's')
  local now = now_ms()
  for i = 7, #KEYS do
    redis.call('UNLINK', KEYS[i])
  end
  redis.call('XACK', KEYS[2], 'w', j[2])
  redis.call('XDEL', KEYS[2], j[2])
  local held_by = redis.call('HGET', KEYS[4], j[1])
  if held_by then
    local cost, encode, decode, bytes, tenant = string.match(held_by, '^(%d+) (%d+) (%d+) (%d+) %d+ (.*)$')
    redis.call('HDEL', KEYS[4], j[1])
    redis.call('HINCRBY', KEYS[3], 'tokens', 0 - cost) -- not -cost: minus zero is no integer to Redis 7.0
    redis.call('HINCRBY', KEYS[3], 'encode', 0 - encode)
    redis.call('HINCRBY', KEYS[3], 'decode', 0 - decode)
    redis.call('HINCRBY', KEYS[3], 'bytes', 0 - bytes)
    redis.call('HINCRBY', KEYS[3], 'items', -1)
    if redis.call('HINCRBY', KEYS[3], 't:' .. tenant, 0 - cost) <= 0 then
      redis.call('HDEL', KEYS[3], 't:' .. tenant)
    end
  end
  redis.call('HSET', KEYS[1], 'st', state)
  redis.call('PEXPIRE', KEYS[1], 60000) -- for repeated submits and commits
  local queue_ms = ms((tonumber(j[5]) or now) - j[4])
  redis.call('XADD', KEYS[5], 'MAXLEN', '~', 10000, '*', 'id', j[1], 'st', state, 'code', code, 'detail', detail,
    'n', j[3], 'q', queue_ms, unpack(more or {}))
  redis.call('PEXPIRE', KEYS[5], 60000) -- a dead API process' answers go away by themselves
  return state
end
